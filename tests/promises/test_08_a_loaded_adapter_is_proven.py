"""Promise 8: an adapter that an engine does not really apply is found before any caller is.

Several engines, of which one alone is at fault: that one suffices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback.db import Database
from feedback.errors import Conflict
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import MAX_LORAS, RunningGateway, start_gateway

pytestmark = pytest.mark.promises
CHAT = "/v1/chat/completions"


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    with (
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as one,
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as other,
    ):
        yield [one, other]


@pytest.fixture
def gateway(
    sqlite_database: Database, engines: list[FakeEngine], tmp_path: Path
) -> Iterator[RunningGateway]:
    addresses = [engine.address for engine in engines]
    with start_gateway(sqlite_database, tmp_path / "data", addresses) as running:
        running.reconcile()
        yield running


def test_no_op_and_wrong_weights_on_one_engine_of_two_stop_a_promotion(
    gateway: RunningGateway, engines: list[FakeEngine]
) -> None:
    for seed, (faults, code) in enumerate(
        [
            (Faults(load_does_nothing=True), "not_active"),
            (Faults(load_wrong_weights=True), "wrong_weights"),
        ]
    ):
        candidate = gateway.candidate(seed)
        engines[1].faults = faults
        with pytest.raises(Conflict) as refused:
            gateway.promote(candidate.name)
        assert refused.value.code == code
        asked = [r.body["model"] for engine in engines for r in engine.requests if r.path == CHAT]
        assert candidate.engine_name not in asked


def test_bf16_sized_noise_and_a_quantised_base_are_neither_refused_nor_waved_through_by_a_machine(
    gateway: RunningGateway, engines: list[FakeEngine]
) -> None:
    for faults in (Faults(logprob_noise=0.05), Faults(logprob_shift=0.3)):
        strong = gateway.candidate(10, decision="pass")
        for engine in engines:
            engine.faults = faults
        gateway.promote(strong.name)  # whole nats stand out of such noise
        gateway.rollback()
    for faults in (Faults(logprob_noise=2.0), Faults(logprob_shift=4.0)):
        hidden = gateway.candidate(11)
        for engine in engines:
            engine.faults = faults
        with pytest.raises(Conflict) as refused:
            gateway.promote(hidden.name, by_machine=True, force=False, note=None)
        assert refused.value.code == "unproven"
        gateway.promote(hidden.name, note="spoke with it", force=False)
        gateway.rollback()
