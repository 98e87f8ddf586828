"""Answers whose end was recorded but not sent never stay complete.

Whatever fails, and in whatever order.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, OperationalError

from feedback.db import Database, Driver, Writing
from feedback.people import find_or_create_person
from feedback.recording import record_started
from feedback.tables import Answer, AnswerStatus
from server.chat.frames import ENDED, FRAME, UNDELIVERED, Report, ended_json, report_json
from server.chat.link import Link
from server.chat.writer import Writer
from tests.rows import started_answer
from tests.server.chat.test_recorder import ended, until, with_process

pytestmark = pytest.mark.processes

COMMITS = "commits"
AWAY = "is away"  #: nothing can be written
BREAKS = "breaks after COMMIT"  #: it is committed, and the writer is not told
REFUSED = "is refused"
#: what the hands of `_Scene` do: an end is sent, or taken back; the writer takes a turn
SEND, TAKE_BACK, TURN = "send", "take back", "turn"


class _Faulty(Writing):
    """Transactions of a real database that end as `outcomes` says; after these all commit."""

    def __init__(self, database: Database, outcomes: Sequence[str]) -> None:
        super().__init__(database)
        self._outcomes = iter(outcomes)

    @contextmanager
    def transaction(self, *, durable: bool) -> Iterator[Driver]:
        outcome = next(self._outcomes, COMMITS)
        if outcome == AWAY:
            raise OperationalError("BEGIN", {}, Exception("the database is away"))
        with super().transaction(durable=durable) as driver:
            yield driver
            if outcome == REFUSED:
                raise IntegrityError("UPDATE", {}, Exception("refused"))
        if outcome == BREAKS:
            raise OperationalError("COMMIT", {}, Exception("the connection broke"))


class _Scene:
    """A writer in the hands of a test, over a database that fails by plan; its answers began."""

    def __init__(self, database: Database, folder: Path, outcomes: Sequence[str]) -> None:
        self.letters = folder / "letters.jsonl"
        self._database = database
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.writer = Writer(database, self.letters, theirs)
        self.writer._writing = _Faulty(database, outcomes)
        with database.write() as session:
            person = find_or_create_person(session, "anna").id
            self.rows = [started_answer(person) for _ in range(3)]
            record_started(Driver.of(session), self.rows)
        self.sent: set[int] = set()
        self.taken_back: set[int] = set()

    def act(self, what: str, which: int) -> None:
        if what == TURN:
            self.writer.turn(wait=False)
        elif what == SEND and which not in self.sent:
            self.sent.add(which)
            end = ended(self.rows[which])
            self._frame(ENDED, which + 1, ended_json.dump_json(end))
        elif what == TAKE_BACK and which in self.sent - self.taken_back:
            self.taken_back.add(which)
            self._frame(UNDELIVERED, 100 + which, self.rows[which].id.encode())

    def finish(self) -> None:
        """Give the writer turns until nothing is left to do."""
        for _ in range(50):
            self.writer.turn(wait=False)

    def reports(self) -> list[Report]:
        received = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                received += self._ours.recv(1 << 20)
        return [report_json.validate_json(line) for line in received.splitlines()]

    def statuses(self) -> list[str]:
        with self._database.read() as session:
            found = {a.id: a.status for a in session.scalars(select(Answer))}
        return [found[row.id] for row in self.rows]

    def close(self) -> None:
        self._ours.close()
        self.writer.run()
        self.writer._gateway.close()

    def _frame(self, kind: int, number: int, body: bytes) -> None:
        self._ours.sendall(FRAME.pack(kind, number, len(body)) + body)


ACTIONS = st.lists(
    st.tuples(st.sampled_from([SEND, TAKE_BACK, TURN]), st.integers(0, 2)), max_size=14
)
OUTCOMES = st.lists(st.sampled_from([COMMITS, AWAY, BREAKS, REFUSED]), max_size=8)


@settings(
    max_examples=80,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # each example commits to a disk: to shrink takes long
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(actions=ACTIONS, outcomes=OUTCOMES)
@example(actions=[(SEND, 0), (TURN, 0)], outcomes=[BREAKS, AWAY, AWAY])
@example(actions=[(SEND, 0), (TURN, 0), (TAKE_BACK, 0), (TURN, 0)], outcomes=[COMMITS, AWAY, AWAY])
@example(actions=[(SEND, 0), (SEND, 1), (TURN, 0)], outcomes=[BREAKS, REFUSED, AWAY, REFUSED])
@example(actions=[(SEND, 0), (TURN, 0), (TAKE_BACK, 0)], outcomes=[BREAKS, REFUSED, REFUSED])
@example(actions=[(SEND, 0), (TURN, 0), (TAKE_BACK, 0), (TURN, 0)], outcomes=[COMMITS, REFUSED])
def test_a_row_is_complete_exactly_where_its_client_may_have_seen_the_end(
    sqlite_database: Database,
    tmp_path: Path,
    actions: list[tuple[str, int]],
    outcomes: list[str],
) -> None:
    _check(sqlite_database, tmp_path, actions, outcomes)


@pytest.mark.parametrize("fails", [[BREAKS, AWAY, AWAY], [BREAKS, REFUSED, AWAY], [AWAY, BREAKS]])
def test_the_same_holds_on_postgresql(
    postgres_database: Database, tmp_path: Path, fails: list[str]
) -> None:
    _check(postgres_database, tmp_path, [(SEND, 0), (SEND, 1), (TURN, 0), (TAKE_BACK, 1)], fails)


def _check(
    database: Database, folder: Path, actions: list[tuple[str, int]], outcomes: list[str]
) -> None:
    scene = _Scene(database, folder, outcomes)
    for what, which in actions:
        scene.act(what, which)
    scene.finish()
    told: dict[int, list[str | None]] = {}
    settled: list[int] = []
    for report in scene.reports():
        settled += report.numbers
        for number in [*report.numbers, *report.kept_numbers]:
            told.setdefault(number, []).append(report.error)
    for which, status in enumerate(scene.statuses()):
        was_told_the_end = told.get(which + 1, [""])[0] is None
        may_be_complete = was_told_the_end and which not in scene.taken_back
        if which not in scene.sent:
            assert status == AnswerStatus.STARTED
        elif may_be_complete:
            assert status == AnswerStatus.COMPLETE
        else:
            assert status in (AnswerStatus.INTERRUPTED, AnswerStatus.FAILED)
    # The recorder forgets a row once it is settled, so each is settled once.
    expected = {n + 1 for n in scene.sent} | {100 + n for n in scene.taken_back}
    assert sorted(settled) == sorted(expected)
    scene.close()


def test_what_is_taken_back_and_never_written_is_left_to_a_person(
    sqlite_database: Database, tmp_path: Path
) -> None:
    scene = _Scene(sqlite_database, tmp_path, [COMMITS, *[AWAY] * 9])
    scene.act(SEND, 0)
    scene.act(TURN, 0)
    scene.act(TAKE_BACK, 0)
    scene.close()
    (letter,) = map(json.loads, scene.letters.read_text().splitlines())
    assert letter["id"] == scene.rows[0].id
    assert (letter["status"], letter["error_code"]) == ("interrupted", "not_delivered")


@pytest.mark.anyio
async def test_what_a_writer_had_kept_or_was_to_take_back_when_it_died_is_done_by_the_next(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        person = find_or_create_person(session, "anna").id
    async with with_process(sqlite_database, tmp_path) as recorder:
        kept, taken = started_answer(person), started_answer(person)
        for row in (kept, taken):
            await recorder.record(row, 10)
        await recorder.record(ended(taken), 10)
        link = recorder._link
        assert link is not None
        assert recorder.process is not None
        recorder.process.send_signal(signal.SIGSTOP)  # it reports nothing of what follows
        recorder.record_soon(ended(kept))
        (number,) = recorder._waiting
        error = Report([], [number], "the database is away", 1, 3, 0, 1, away=True)
        link.data_received(report_json.dump_json(error) + b"\n")
        recorder.take_back(ended(taken))
        for _ in range(2):  # the next one dies as well before it has done anything
            await until(lambda: recorder._link is not None)
            recorder.process.send_signal(signal.SIGSTOP)
            dead = recorder._link
            recorder.process.kill()
            await until(lambda dead=dead: recorder._link is not dead)  # type: ignore[misc] - bound
        await until(lambda: recorder.depth == 0 and recorder._link is not None)
        await until(lambda: set(_statuses(sqlite_database)) == {AnswerStatus.INTERRUPTED})
    assert recorder.lost == 0


def _statuses(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(Answer.status)))


class _Transport:
    """What a link writes to; counts how often it is asked for its buffer."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, piece: bytes) -> None:
        self.written.append(piece)

    def get_write_buffer_size(self) -> int:
        return 0


class _Pieces(dict[int, tuple[bytes, bytes]]):
    """Refuses to be gone through while it waits."""

    def values(self) -> Any:
        raise AssertionError("the queue was gone through")


@pytest.mark.anyio
async def test_how_far_the_writer_is_behind_is_known_without_a_look_at_the_queue() -> None:
    link = Link(lambda _report: None, lambda _link: None)
    link.connection_made(_Transport())  # type: ignore[arg-type] - all that is asked of it
    link._unsent = _Pieces()
    for number in range(1, 4):
        link.send(ENDED, number, b"x" * 100)
    assert link.unsent_bytes == 3 * (FRAME.size + 100)
    link._unsent = {}
