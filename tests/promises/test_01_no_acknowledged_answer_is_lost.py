"""Promise 1: whoever saw the end of an answer finds it, though the gateway was killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select, text

from feedback.tables import Answer, AnswerStatus, AnswerText
from tests.fake_engine import fake_answer
from tests.gateway_fixtures import make_candidate
from tests.promise_fixtures import Figures
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import scaled
from tests.promises.traffic import Traffic
from tuner.adapters import AdapterStore
from tuner.moves import move_production

pytestmark = pytest.mark.promises


def test_each_answer_whose_end_was_seen_has_one_complete_row_after_every_kill(
    tmp_path: Path,
    figures: Figures,
) -> None:
    kills = max(20, scaled(200))
    place = prepare(tmp_path)
    base, settings, database = place.base, place.settings, place.database
    store = AdapterStore(settings.adapters_dir)
    candidate = make_candidate(database, store, 1, base=base)
    with database.write() as session:
        move_production(session, "assistant", 1, expected_generation=0)
    key = place.key()
    chance = random.Random(0)
    traffic = Traffic([], key)
    with engine_process() as engine:
        httpx.post(f"{engine}/fake/faults", json={"token_seconds": 0.001}, trust_env=False)
        for _ in range(kills):
            log = tmp_path / "gateway.log"
            with gateway_process(settings.data, base.path, engine, log) as gateway:
                traffic.urls = [gateway.url]
                with traffic.running():
                    traffic.wait_for(12)
                    # The kill must strike at any moment of the answers under way.
                    time.sleep(chance.random() * 0.05)
                    gateway.kill()
            with database.read() as session:
                assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        with gateway_process(settings.data, base.path, engine, tmp_path / "gateway.log") as gateway:
            assert gateway.terminate() == 0
        state = httpx.get(f"{engine}/fake/state", trust_env=False).json()
    with database.read() as session:
        rows = {row.id: row for row in session.scalars(select(Answer))}
        said = {row.answer_id: row.choices for row in session.scalars(select(AnswerText))}
    database.dispose()
    assert len({heard.id for heard in traffic.answers}) == len(traffic.answers) >= 12 * kills // 2
    for heard in traffic.answers:
        row, choices = rows[heard.id], said[heard.id]
        assert (row.status, row.release) == (AnswerStatus.COMPLETE, candidate.name)
        assert choices is not None
        assert choices[0]["message"]["content"] == heard.content
        assert heard.content == fake_answer(candidate.signature, heard.messages)
    assert AnswerStatus.STARTED not in {row.status for row in rows.values()}
    assert state["loads"] == 1  # the engine was adopted each time
    figures(kills=kills, answers=len(traffic.answers), lost=0)
