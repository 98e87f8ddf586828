"""Groups of rows, rows that cannot be written, a database that is away."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from feedback.answers import EndedAnswer, StartedAnswer
from feedback.db import Database, new_id
from feedback.people import find_or_create_person
from feedback.tables import Answer, AnswerStatus
from server.recorder import NotRecorded, Recorder

pytestmark = pytest.mark.anyio


@pytest.fixture
def person(database: Database) -> str:
    with database.write() as session:
        return find_or_create_person(session, "anna").id


@pytest.fixture
def recorder(database: Database, tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(database, tmp_path / "dead" / "letters.jsonl")
    recorder.start()
    yield recorder
    recorder.stop()


def started(person: str, **more: Any) -> StartedAnswer:
    values: dict[str, Any] = {
        "id": new_id("chatcmpl-"),
        "person_id": person,
        "key_id": None,
        "deployment": "assistant",
        "release": "assistant@0",
        "requested_model": "assistant",
        "arm": "production",
        "propensity": 1.0,
        "generation": 0,
        "engine": None,
        "gateway": "gw_1",
        "kind": "chat",
        "messages": [{"role": "user", "content": "hi"}],
        "prefix_hash": new_id(""),
        "root_hash": "r",
        "sampling": {},
    }
    return StartedAnswer(**{**values, **more})


def ended(answer: StartedAnswer) -> EndedAnswer:
    message = {"role": "assistant", "content": "hello"}
    return EndedAnswer(
        id=answer.id,
        person_id=answer.person_id,
        status=AnswerStatus.COMPLETE,
        choices=[{"index": 0, "message": message, "finish_reason": "stop"}],
        messages=answer.messages,
    )


def statuses(database: Database) -> dict[str, str]:
    with database.read() as session:
        return {a.id: a.status for a in session.scalars(select(Answer))}


async def test_what_was_awaited_is_committed_and_groups_form_under_load(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = recorder._write
    monkeypatch.setattr(recorder, "_write", lambda g: (sizes.append(len(g)), write(g)))
    rows = [started(person) for _ in range(200)]
    await asyncio.gather(*(recorder.record(row) for row in rows))
    await asyncio.gather(*(recorder.record(ended(row)) for row in rows))
    assert statuses(database) == dict.fromkeys([row.id for row in rows], "complete")
    assert sum(sizes) == recorder.committed == 400
    assert max(sizes) <= 64
    assert len(sizes) < 100


async def test_a_row_that_cannot_be_written_takes_no_neighbour_along(
    database: Database, recorder: Recorder, person: str
) -> None:
    rows = [started(person) for _ in range(5)]
    rows[2].person_id = "person_nobody"
    results = await asyncio.gather(*(recorder.record(r) for r in rows), return_exceptions=True)
    assert [isinstance(result, NotRecorded) for result in results] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert len(statuses(database)) == 4
    assert recorder.lost == 0  # nothing was answered yet


async def test_the_end_of_an_answer_that_is_refused_becomes_a_dead_letter(
    recorder: Recorder, person: str, tmp_path: Path
) -> None:
    row = started(person)
    await recorder.record(row)
    refused = ended(row)
    refused.choices[0]["logprobs"] = float("nan")  # no JSON
    with pytest.raises(NotRecorded):
        await recorder.record(refused)
    assert recorder.lost == 1
    letters = tmp_path / "dead" / "letters.jsonl"
    assert json.loads(letters.read_text())["choices"][0]["message"]["content"] == "hello"
    assert letters.stat().st_mode & 0o777 == 0o600


async def test_ends_wait_for_a_database_that_is_away_and_say_that_nobody_got_them(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [started(person) for _ in range(3)]
    await asyncio.gather(*(recorder.record(row) for row in rows))
    write, away = recorder._write, threading.Event()
    away.set()

    def fails(group: Any) -> None:
        if away.is_set():
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        write(group)

    monkeypatch.setattr(recorder, "_write", fails)
    late = started(person)
    waits = [*(recorder.record(ended(row)) for row in rows), recorder.record(late)]
    assert all(
        isinstance(result, NotRecorded)
        for result in await asyncio.gather(*waits, return_exceptions=True)
    )
    assert recorder.depth == 3
    away.clear()
    fresh = started(person)
    await recorder.record(fresh)
    async with asyncio.timeout(5):
        while recorder.committed < 7:
            await asyncio.sleep(0.01)
    found = statuses(database)
    assert [found[row.id] for row in rows] == ["interrupted"] * 3
    assert late.id not in found
    assert recorder.lost == 0


async def test_whoever_stopped_waiting_is_not_said_to_have_got_the_end(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        person = find_or_create_person(session, "anna").id
    recorder = Recorder(sqlite_database, tmp_path / "letters")
    recorder.start()
    row = started(person)
    await recorder.record(row)
    locked = sqlite_database.engine.raw_connection()
    locked.execute("BEGIN IMMEDIATE")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(recorder.record(ended(row)), 0.05)
    locked.execute("ROLLBACK")
    locked.close()
    await asyncio.to_thread(recorder.stop)
    with sqlite_database.read() as session:
        found = session.get_one(Answer, row.id)
        assert (found.status, found.error_code) == ("interrupted", "not_delivered")


async def test_stopping_writes_what_is_queued(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        person = find_or_create_person(session, "anna").id
    recorder = Recorder(database, tmp_path / "letters")
    recorder.start()
    row = started(person)
    await recorder.record(row)
    recorder.record_soon(ended(row))
    await asyncio.to_thread(recorder.stop)
    assert statuses(database) == {row.id: "complete"}
