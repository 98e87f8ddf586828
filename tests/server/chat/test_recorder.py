"""Groups of rows, rows that cannot be written, a database that is away, a writer that dies."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from feedback.answers import find_earlier, get_metadata, messages_hash
from feedback.db import Database
from feedback.people import find_or_create_person
from feedback.recording import EndedAnswer, StartedAnswer
from feedback.tables import Answer, AnswerStatus, AnswerText, Conversation
from server.chat.link import MOST_UNDER_WAY
from server.chat.recorder import NotRecorded, NotSent, Recorder, RefersToNothing
from server.chat.writer import Writer, writer_lock
from tests.rows import started_answer

pytestmark = pytest.mark.anyio

SECONDS = 10.0  #: longest wait for a commit
#: What happens before the database is the same on both.
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def person(database: Database) -> str:
    with database.write() as session:
        return find_or_create_person(session, "anna").id


@pytest.fixture
async def recorder(database: Database, tmp_path: Path) -> AsyncIterator[Recorder]:
    """With its writer in a thread."""
    recorder = Recorder(database, tmp_path / "dead" / "letters.jsonl")
    await recorder.start()
    yield recorder
    await recorder.stop()


@asynccontextmanager
async def with_process(database: Database, folder: Path) -> AsyncIterator[Recorder]:
    recorder = Recorder(
        database, folder / "letters.jsonl", own_process=True, lock=folder / "writer.lock"
    )
    await recorder.start()
    try:
        yield recorder
    finally:
        await recorder.stop()


def ended(answer: StartedAnswer) -> EndedAnswer:
    message = {"role": "assistant", "content": "hello"}
    return EndedAnswer(
        id=answer.id,
        status=AnswerStatus.COMPLETE,
        choices=[{"index": 0, "message": message, "finish_reason": "stop"}],
        hashes=[messages_hash(answer.person_id, [*answer.messages, message])],
    )


def whole(answer: StartedAnswer) -> EndedAnswer:
    """A plain answer, of which nothing was recorded before."""
    return replace(ended(answer), start=answer)


def statuses(database: Database) -> dict[str, str]:
    with database.read() as session:
        return {a.id: a.status for a in session.scalars(select(Answer))}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)  # another thread or process gets there


def writer_of(recorder: Recorder) -> Writer:
    assert recorder.writer is not None
    return recorder.writer


def fill_disk(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have every commit fail for as long as the event is set, which it is."""
    writer, full = writer_of(recorder), threading.Event()
    write = writer._write
    full.set()

    def fails(group: Any) -> None:
        if full.is_set():
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        write(group)

    monkeypatch.setattr(writer, "_write", fails)
    return full


async def test_what_was_awaited_is_committed_and_groups_form_under_load(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    writer = writer_of(recorder)
    write = writer._write
    monkeypatch.setattr(writer, "_write", lambda g: (sizes.append(len(g)), write(g)))
    rows = [started_answer(person) for _ in range(200)]
    await asyncio.gather(*(recorder.record(row, SECONDS) for row in rows))
    await asyncio.gather(*(recorder.record(ended(row), SECONDS) for row in rows))
    assert statuses(database) == dict.fromkeys([row.id for row in rows], "complete")
    assert sum(sizes) == recorder.committed == 400
    assert recorder.depth == 0
    assert max(sizes) <= (24 if database.is_sqlite else 64)
    assert len(sizes) < 200


async def test_a_row_that_cannot_be_written_takes_no_neighbour_along(
    database: Database, recorder: Recorder, person: str
) -> None:
    rows = [started_answer(person) for _ in range(5)]
    rows[2].person_id = "person_nobody"
    results = await asyncio.gather(
        *(recorder.record(row, SECONDS) for row in rows), return_exceptions=True
    )
    assert [isinstance(result, NotRecorded) for result in results] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert len(statuses(database)) == 4
    assert recorder.lost == 0  # nothing was answered yet


async def test_who_waits_is_told_whether_a_person_is_gone_or_the_database_is_away(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [started_answer(person), started_answer("person_erased"), started_answer(person)]
    found = await asyncio.gather(
        *(recorder.record(row, SECONDS) for row in rows), return_exceptions=True
    )
    assert list(map(type, found)) == [type(None), RefersToNothing, type(None)]

    def away(_group: object) -> None:
        raise OperationalError("COMMIT", {}, Exception("the server is away"))

    monkeypatch.setattr(writer_of(recorder), "_write", away)
    with pytest.raises(NotRecorded) as error:
        await recorder.record(started_answer(person), SECONDS)
    assert type(error.value) is NotRecorded


async def test_the_end_of_an_answer_that_is_refused_becomes_a_dead_letter(
    database: Database, recorder: Recorder, person: str, tmp_path: Path
) -> None:
    row = started_answer(person)
    await recorder.record(row, SECONDS)
    refused = ended(row)
    refused.choices[0]["index"] = None  # its row must have one
    with pytest.raises(NotRecorded):
        await recorder.record(refused, SECONDS)
    assert recorder.lost == 1
    letters = tmp_path / "dead" / "letters.jsonl"
    assert json.loads(letters.read_text())["choices"][0]["message"]["content"] == "hello"
    assert letters.stat().st_mode & 0o777 == 0o600
    await until(lambda: statuses(database) == {row.id: "failed"})


async def test_ends_wait_for_a_database_that_is_away_and_say_that_nobody_got_them(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [started_answer(person) for _ in range(3)]
    await asyncio.gather(*(recorder.record(row, SECONDS) for row in rows))
    away = fill_disk(recorder, monkeypatch)
    late = started_answer(person)
    waits = [
        *(recorder.record(ended(row), SECONDS) for row in rows),
        recorder.record(late, SECONDS),
    ]
    assert all(
        isinstance(result, NotRecorded)
        for result in await asyncio.gather(*waits, return_exceptions=True)
    )
    await until(lambda: recorder.depth == 3)
    away.clear()
    fresh = started_answer(person)
    await recorder.record(fresh, SECONDS)
    await until(lambda: recorder.committed == 7)
    found = statuses(database)
    assert [found[row.id] for row in rows] == ["interrupted"] * 3
    assert late.id not in found
    assert recorder.lost == 0


async def test_a_plain_answer_is_one_row_that_is_found_again(
    database: Database, recorder: Recorder, person: str
) -> None:
    first = started_answer(person, metadata={"team": "blue"})
    await recorder.record(whole(first), SECONDS)
    said = [*first.messages, whole(first).choices[0]["message"]]
    with database.read() as session:
        answer = session.get_one(Answer, first.id)
        assert answer.status == "complete"
        assert answer.ended_at is not None
        assert session.get_one(AnswerText, first.id).choices == whole(first).choices
        assert get_metadata(session, [first.id]) == {first.id: {"team": "blue"}}
        found = find_earlier(
            session, person, continuation=messages_hash(person, said), external_id=None
        )
    assert found is not None
    assert found.id == first.id
    assert recorder.committed == 1


async def test_a_plain_answer_that_is_sent_again_stays_one(
    database: Database, recorder: Recorder, person: str
) -> None:
    rows = [whole(started_answer(person)) for _ in range(2)]
    await recorder.record(rows[0], SECONDS)
    again = [replace(row, start_may_be_there=True) for row in rows]  # of a writer that died
    await asyncio.gather(*(recorder.record(row, SECONDS) for row in again))
    assert statuses(database) == dict.fromkeys([row.id for row in rows], "complete")
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Conversation)) == 2


async def test_an_end_makes_up_for_a_start_that_did_not_get_there(
    database: Database, recorder: Recorder, person: str
) -> None:
    there, lost = started_answer(person), started_answer(person)
    await recorder.record(there, SECONDS)
    ends = [replace(whole(row), start_may_be_there=True) for row in (there, lost)]
    await asyncio.gather(*(recorder.record(end, SECONDS) for end in ends))
    assert statuses(database) == {there.id: "complete", lost.id: "complete"}


async def test_of_a_person_who_is_gone_nothing_is_kept(
    database: Database, recorder: Recorder, tmp_path: Path
) -> None:
    with pytest.raises(RefersToNothing):
        await recorder.record(whole(started_answer("person_erased")), SECONDS)
    assert (statuses(database), recorder.lost, recorder.depth) == ({}, 0, 0)
    assert not (tmp_path / "dead" / "letters.jsonl").exists()


async def test_a_plain_answer_that_is_refused_becomes_a_dead_letter_and_a_row_without_its_text(
    database: Database, recorder: Recorder, person: str, tmp_path: Path
) -> None:
    refused = whole(started_answer(person))
    refused.choices[0]["index"] = None  # its row must have one
    with pytest.raises(NotRecorded):
        await recorder.record(refused, SECONDS)
    await until(lambda: statuses(database) == {refused.id: "failed"})
    letter = json.loads((tmp_path / "dead" / "letters.jsonl").read_text())
    assert letter["choices"][0]["message"]["content"] == "hello"
    with database.read() as session:
        assert session.get(AnswerText, refused.id) is None


async def test_a_plain_answer_waits_for_a_database_that_is_away_and_says_that_nobody_got_it(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = fill_disk(recorder, monkeypatch)
    row = whole(started_answer(person))
    with pytest.raises(NotRecorded):
        await recorder.record(row, SECONDS)
    with pytest.raises(NotSent, match="away"):  # no engine is asked any more
        await recorder.check(SECONDS)
    away.clear()
    await until(lambda: statuses(database) == {row.id: "interrupted"})
    await until(lambda: not recorder.depth)
    await recorder.check(SECONDS)


@ON_SQLITE
async def test_a_database_that_is_back_is_found_though_nothing_waits_for_it(
    database: Database, recorder: Recorder, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_group: object) -> None:
        raise OperationalError("COMMIT", {}, Exception("the disk is away"))

    with monkeypatch.context() as patched:
        patched.setattr(writer_of(recorder), "_write", away)
        with pytest.raises(NotRecorded):
            await recorder.record(started_answer(person), SECONDS)
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await recorder.check(SECONDS)
            except NotSent:
                await asyncio.sleep(0.05)  # the writer's thread looks now and then


@ON_SQLITE
async def test_a_writer_that_waits_for_a_lock_is_known_not_to_write(
    database: Database, recorder: Recorder, person: str
) -> None:
    locked = database.engine.raw_connection()
    locked.execute("BEGIN IMMEDIATE")
    waits = asyncio.ensure_future(recorder.record(whole(started_answer(person)), SECONDS))
    await recorder.check(SECONDS)  # it has just got something
    await asyncio.sleep(0.1)  # longer than a commit takes
    with pytest.raises(NotSent, match="too far behind"):
        await recorder.check(0.1)
    locked.execute("ROLLBACK")
    locked.close()
    await waits
    await recorder.check(SECONDS)


@pytest.mark.parametrize("gives_up", ["is cancelled", "waits no longer"])
async def test_whoever_stopped_waiting_is_not_said_to_have_got_the_end(
    sqlite_database: Database, tmp_path: Path, gives_up: str
) -> None:
    with sqlite_database.write() as session:
        person = find_or_create_person(session, "anna").id
    recorder = Recorder(sqlite_database, tmp_path / "letters")
    await recorder.start()
    row = started_answer(person)
    await recorder.record(row, SECONDS)
    locked = sqlite_database.engine.raw_connection()
    locked.execute("BEGIN IMMEDIATE")
    if gives_up == "is cancelled":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(recorder.record(ended(row), SECONDS), 0.05)
    else:
        with pytest.raises(NotRecorded, match=r"not committed within 0.05 s"):
            await recorder.record(ended(row), 0.05)
    locked.execute("ROLLBACK")
    locked.close()
    await recorder.stop()
    with sqlite_database.read() as session:
        found = session.get_one(Answer, row.id)
        assert (found.status, found.error_code) == ("interrupted", "not_delivered")


async def test_a_row_that_is_not_understood_costs_nobody_else_a_commit(
    database: Database, recorder: Recorder, person: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, row = started_answer(person), started_answer(person)
    broken.messages = "what somebody said"  # type: ignore[assignment] - the fault that is tested
    results = await asyncio.gather(
        *(recorder.record(each, SECONDS) for each in (broken, row)), return_exceptions=True
    )
    assert [type(result) for result in results] == [NotRecorded, type(None)]
    assert statuses(database) == {row.id: "started"}
    assert recorder.depth == 0
    assert "somebody said" not in caplog.text


@pytest.mark.parametrize("sent_again", [False, True])
async def test_an_end_that_was_committed_and_not_sent_is_taken_back(
    database: Database, recorder: Recorder, person: str, sent_again: bool
) -> None:
    row = started_answer(person)
    await recorder.record(row, SECONDS)
    await recorder.record(ended(row), SECONDS)
    if sent_again:
        recorder.record_soon(ended(row))  # as to the writer after one that died
    recorder.take_back(ended(row))  # what a wait does that ends in the very moment of the commit
    await until(lambda: statuses(database) == {row.id: "interrupted"})


async def test_stopping_writes_what_is_queued(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        person = find_or_create_person(session, "anna").id
    recorder = Recorder(database, tmp_path / "letters")
    await recorder.start()
    row = started_answer(person)
    await recorder.record(row, SECONDS)
    recorder.record_soon(ended(row))
    await recorder.stop()
    assert statuses(database) == {row.id: "complete"}


@pytest.mark.processes
async def test_the_writer_s_process_writes_and_holds_its_lock_until_it_has(
    database: Database, person: str, tmp_path: Path
) -> None:
    async with with_process(database, tmp_path) as recorder:
        rows = [
            started_answer(person, messages=[{"role": "user", "content": "ü\u2028" * n}])
            for n in (1, 9)
        ]
        await asyncio.gather(*(recorder.record(row, SECONDS) for row in rows))
        for row in rows:
            recorder.record_soon(ended(row))
        with pytest.raises(BlockingIOError), (tmp_path / "writer.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with writer_lock(tmp_path / "writer.lock"):
        assert statuses(database) == dict.fromkeys([row.id for row in rows], "complete")


@pytest.mark.processes
@ON_SQLITE
async def test_after_the_death_of_the_writer_another_one_writes_what_was_sent_and_what_comes(
    database: Database, person: str, tmp_path: Path
) -> None:
    async with with_process(database, tmp_path) as recorder:
        answered, waits, left, lost, hasty, late = [started_answer(person) for _ in range(6)]
        for row in (answered, waits, left):
            await recorder.record(row, SECONDS)
        await recorder.record(ended(answered), SECONDS)
        assert recorder.process is not None
        os.kill(recorder.process.pid, signal.SIGSTOP)
        sent = [recorder.record(row, SECONDS) for row in (ended(waits), ended(left), lost)]
        waiting, leaving, starting = map(asyncio.ensure_future, sent)
        await asyncio.sleep(0)  # they have been sent
        os.kill(recorder.process.pid, signal.SIGKILL)
        with pytest.raises(NotRecorded, match="the writer ended"):
            await starting  # nobody knows whether it was written
        leaving.cancel()
        with pytest.raises(NotRecorded, match="it is being started"):
            await recorder.record(hasty, 0.01)
        await recorder.record(late, SECONDS)
        await waiting
        await until(lambda: statuses(database)[left.id] == "interrupted")
        assert statuses(database) == {
            answered.id: "complete",
            waits.id: "complete",
            left.id: "interrupted",
            late.id: "started",
        }


@pytest.mark.processes
@ON_SQLITE
async def test_an_end_that_nobody_waits_for_any_more_is_owed_too_when_the_writer_dies(
    database: Database, person: str, tmp_path: Path
) -> None:
    async with with_process(database, tmp_path) as recorder:
        row = started_answer(person)
        await recorder.record(row, SECONDS)
        assert recorder.process is not None
        os.kill(recorder.process.pid, signal.SIGSTOP)
        with pytest.raises(NotRecorded, match="not committed within"):
            await recorder.record(ended(row), 0.05)
        os.kill(recorder.process.pid, signal.SIGKILL)
        await until(lambda: statuses(database) == {row.id: "interrupted"})


@ON_SQLITE
async def test_an_end_that_stops_waiting_just_when_the_next_writer_is_there_is_written(
    database: Database, recorder: Recorder, person: str
) -> None:
    row = started_answer(person)
    await recorder.record(row, SECONDS)
    link, recorder._link = recorder._link, None
    recorder._there.clear()
    waiting = asyncio.ensure_future(recorder.record(ended(row), SECONDS))
    await asyncio.sleep(0)  # it waits
    assert link is not None
    recorder._begin(link)
    waiting.cancel()
    await until(lambda: statuses(database) == {row.id: "interrupted"})


@pytest.mark.processes
@ON_SQLITE
async def test_an_end_that_is_taken_back_while_there_is_no_writer_is_taken_back_by_the_next(
    database: Database, person: str, tmp_path: Path
) -> None:
    async with with_process(database, tmp_path) as recorder:
        row = started_answer(person)
        await recorder.record(row, SECONDS)
        await recorder.record(ended(row), SECONDS)
        assert recorder.process is not None
        os.kill(recorder.process.pid, signal.SIGKILL)
        await until(lambda: recorder._link is None)
        recorder.take_back(ended(row))
        await until(lambda: statuses(database) == {row.id: "interrupted"})


async def test_after_its_end_a_recorder_refuses_at_once_and_says_what_it_lost(
    recorder: Recorder, person: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = started_answer(person)
    await recorder.record(row, SECONDS)
    await recorder.stop()
    assert "lost" not in caplog.text
    for late in (started_answer(person), ended(row)):
        with pytest.raises(NotRecorded, match="is not there"):
            await recorder.record(late, SECONDS)
    await recorder.stop()
    assert "Ends of answers may be lost" in caplog.text


@pytest.mark.processes
async def test_a_writer_that_is_far_behind_gets_no_new_answers(
    database: Database, person: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.chat.recorder.MOST_UNSENT_BYTES", 1000)
    async with with_process(database, tmp_path) as recorder:
        assert recorder.process is not None
        os.kill(recorder.process.pid, signal.SIGSTOP)
        rows = [started_answer(person, prefix_hash="x" * 600) for _ in range(8)]
        waits = [asyncio.ensure_future(recorder.record(row, 0.05)) for row in rows]
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert "the writer is too far behind" in {str(result) for result in results}
        os.kill(recorder.process.pid, signal.SIGCONT)


@pytest.mark.processes
@ON_SQLITE
async def test_a_start_that_nobody_waits_for_any_more_is_not_sent_to_a_writer_that_is_behind(
    database: Database, person: str, tmp_path: Path
) -> None:
    async with with_process(database, tmp_path) as recorder:
        assert recorder.process is not None
        assert recorder._link is not None
        link, rows = recorder._link, [started_answer(person) for _ in range(MOST_UNDER_WAY + 3)]
        os.kill(recorder.process.pid, signal.SIGSTOP)
        waits = []
        for row in rows[:MOST_UNDER_WAY]:  # a portion each, which the writer has
            waits.append(asyncio.ensure_future(recorder.record(row, 0.3)))
            await asyncio.sleep(0)
            await until(lambda: not link._unsent)
        waits += [
            asyncio.ensure_future(recorder.record(row, 0.3)) for row in rows[MOST_UNDER_WAY:-1]
        ]
        left = asyncio.ensure_future(recorder.record(rows[-1], SECONDS))
        await asyncio.sleep(0)
        left.cancel()
        results = await asyncio.gather(*waits, left, return_exceptions=True)
        kinds = [NotRecorded] * MOST_UNDER_WAY + [NotSent, NotSent, asyncio.CancelledError]
        assert [type(result) for result in results] == kinds
        assert (link.unsent_bytes, recorder.depth) == (0, MOST_UNDER_WAY)
        os.kill(recorder.process.pid, signal.SIGCONT)
        last = started_answer(person)
        await recorder.record(last, SECONDS)
        assert recorder.depth == 0
        assert set(statuses(database)) == {row.id for row in [*rows[:MOST_UNDER_WAY], last]}


async def test_a_writer_that_cannot_start_is_an_error_at_once(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'nowhere' / 'x.sqlite3'}")
    lock = tmp_path / "nowhere" / "writer.lock"
    recorder = Recorder(database, tmp_path / "letters", own_process=True, lock=lock)
    with pytest.raises(RuntimeError, match="ended before it was ready"):
        await recorder.start()
    await recorder.stop()
