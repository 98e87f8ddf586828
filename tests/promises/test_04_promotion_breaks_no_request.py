"""Promises 3 and 4: flips under load break nothing, and every answer stands under its release."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import select

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus
from tests.fake_engine import BASE, FakeEngine, Faults, fake_answer
from tests.gateway_fixtures import MAX_LORAS, start_gateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled
from tests.promises.traffic import Traffic

pytestmark = pytest.mark.promises


def test_requests_over_flips_between_two_gateways_and_three_engines(
    postgres_database: Database, tmp_path: Path, figures: Figures
) -> None:
    flips, requests = scaled(50), scaled(10_000)
    with ExitStack() as stack:
        engines = [
            stack.enter_context(FakeEngine(api_key="secret", max_loras=MAX_LORAS)) for _ in range(3)
        ]
        for engine in engines:
            engine.faults = Faults(token_seconds=0.001)
        addresses = [engine.address for engine in engines]
        leader, follower = (
            stack.enter_context(start_gateway(postgres_database, tmp_path / "data", addresses))
            for _ in range(2)
        )
        candidates = [leader.candidate(seed) for seed in (1, 2, 3)]
        key = leader.key("anna")
        for gateway in (leader, follower):
            gateway.refresh()
            gateway.reconcile()
        traffic = Traffic([leader.url, follower.url], key)
        flipped: list[float] = []
        with traffic.running(callers=4):
            for flip in range(flips):
                traffic.wait_for(requests // (flips + 1))
                began = time.monotonic()
                leader.promote(candidates[flip % len(candidates)].name)
                flipped.append(time.monotonic() - began)
            traffic.wait_for(requests // (flips + 1))
            loads = sum(engine.slots.loads for engine in engines)
            began = time.monotonic()
            leader.rollback()
            flipped.append(time.monotonic() - began)
            traffic.wait_for(requests // (flips + 1))
            assert sum(engine.slots.loads for engine in engines) == loads
    assert traffic.errors == []
    signatures = {"assistant@0": BASE, **{c.name: c.signature for c in candidates}}
    for heard in traffic.answers:
        assert heard.content == fake_answer(signatures[heard.release], heard.messages)
    with postgres_database.read() as session:
        rows = {row.id: row for row in session.scalars(select(Answer))}
    assert len(rows) == len(traffic.answers)
    for heard in traffic.answers:
        row = rows[heard.id]
        assert (row.status, row.release) == (AnswerStatus.COMPLETE, heard.release)
    assert len({heard.release for heard in traffic.answers}) > 1
    figures(requests=len(rows), flips=flips, slowest_seconds=round(max(flipped), 2), errors=0)
