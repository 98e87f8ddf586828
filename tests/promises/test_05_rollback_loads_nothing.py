"""Promise 5: a rollback takes no more than a second and loads nothing."""

from __future__ import annotations

import time

import pytest

from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled
from tests.promises.traffic import Traffic

pytestmark = pytest.mark.promises


def test_rollback_works_with_loading_switched_off_and_under_load(
    running_gateway: RunningGateway, gateway_engine: FakeEngine, figures: Figures
) -> None:
    first, second = running_gateway.candidate(1), running_gateway.candidate(2)
    running_gateway.promote(first.name)
    running_gateway.promote(second.name)
    gateway_engine.faults = Faults(load_fails=True, token_seconds=0.001)
    loads = gateway_engine.slots.loads
    traffic = Traffic([running_gateway.url], running_gateway.key("anna"))
    seconds: list[float] = []
    with traffic.running():
        for _ in range(scaled(100)):
            traffic.wait_for(5)
            began = time.monotonic()
            running_gateway.rollback()
            seconds.append(time.monotonic() - began)
    assert traffic.errors == []
    assert {heard.release for heard in traffic.answers} == {first.name, second.name}
    assert gateway_engine.slots.loads == loads
    assert max(seconds) <= 1.0
    figures(rollbacks=len(seconds), slowest_ms=round(max(seconds) * 1000), loads=0)
