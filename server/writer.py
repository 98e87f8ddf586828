"""Commits what a gateway records, in groups, on the other side of a socket.

`python -P -m server.writer FD`: a process of its own, so that it shares no interpreter lock with
the requests; `Writer` alone also runs in a thread. Owns: the groups, the dead-letter file, what
happens while the database is away. Covered: a row that cannot be written does not take its
neighbours along; a gateway that is killed (what it had sent is written, then this ends); an answer
whose end was not sent after all. Does not own: what is written (`feedback/recording.py`), who waits
for it (`recorder.py`).

The gateway sends frames: kind, number, length, and so many bytes of JSON. It is told of each group
in a line of JSON (`Report`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import InterfaceError, OperationalError

from feedback.db import Database, Writing
from feedback.recording import (
    NOT_DELIVERED,
    NOT_RECORDED,
    EndedAnswer,
    StartedAnswer,
    record_ended,
    record_started,
    record_undelivered,
)
from feedback.tables import AnswerStatus
from server.logs import configure_logging
from server.machine import collect_garbage_rarely

logger = logging.getLogger(__name__)

LARGEST_GROUP = 64  #: rows
#: On SQLite, where a commit costs little: while one group is committed, the answers of the one
#: before it go on, and requests for the next one come. In one large group all wait together.
LARGEST_SQLITE_GROUP = 24
MOST_KEPT = 10_000  #: ends of answers that wait in memory for a database that is away
RETRY_SECONDS = 0.5
LOCK_SECONDS = 15.0
_PIECE_BYTES = 256 * 1024

FRAME = struct.Struct(">BQI")  #: kind, number (0: nobody waits), bytes that follow
SETUP, STARTED, ENDED, UNDELIVERED = range(4)

Row = StartedAnswer | EndedAnswer
AnyRow = TypeVar("AnyRow", bound=Row)
started_json = TypeAdapter(StartedAnswer)
ended_json = TypeAdapter(EndedAnswer)


@dataclass(frozen=True, slots=True)
class Setup:
    """The first frame that a writer's process gets."""

    database_url: str
    dead_letters: str
    lock: str | None  #: held while the process lives: whoever follows on this database waits for it
    log_level: str


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one group."""

    numbers: list[int]
    error: str | None  #: None: committed
    settled: int  #: rows of the group, waited for or not; not those that were kept before
    committed: int  #: rows since the start
    lost: int  #: rows that went to the dead-letter file since the start
    kept: int  #: rows that wait for a database that is away


setup_json = TypeAdapter(Setup)
report_json = TypeAdapter(Report)


class _Entry:
    __slots__ = ("number", "row", "undelivered", "was_kept")

    def __init__(self, number: int, row: Row, *, was_kept: bool = False) -> None:
        self.number = number
        self.row = row
        self.was_kept = was_kept
        self.undelivered = False

    def due(self) -> Row:
        """The row to write: whoever has stopped waiting for it does not release the answer."""
        return as_undelivered(self.row) if self.undelivered else self.row


class Writer:
    """It commits at once what has come and never lingers for more.

    Groups form by themselves, out of what arrives while a commit is under way. While the database
    is away whoever waits is told at once, and the ends of answers are kept and written later.
    """

    def __init__(self, database: Database, dead_letters: Path, gateway: socket.socket) -> None:
        self._database = database
        self._writing = Writing(database)
        self._dead_letters = dead_letters
        self._gateway = gateway
        self._received = bytearray()
        self._queue: deque[_Entry] = deque()
        self._ends: dict[str, _Entry] = {}  #: of answers, not yet written
        self._undelivered: list[str] = []  #: answers whose row may be complete and should not be
        self._kept: deque[_Entry] = deque()
        self._largest_group = LARGEST_SQLITE_GROUP if database.is_sqlite else LARGEST_GROUP
        self._away = False  #: the last commit did not reach the database
        self._closed = False
        self.lost = 0
        self.committed = 0

    def run(self) -> None:
        """Write until the gateway closes its end, then what has come before that."""
        self._report([], None)  # there, and ready
        while not (self._closed and not self._queue):
            self._read(wait=not self._queue)
            group = [
                self._queue.popleft() for _ in range(min(self._largest_group, len(self._queue)))
            ]
            if group or self._undelivered:
                self._commit(group)
            if self._kept and not (group and self._away):
                self._commit_kept()
        for entry in self._kept:
            if isinstance(entry.row, EndedAnswer):
                self._bury(asdict(entry.row))
        self._writing.close()

    def _read(self, *, wait: bool) -> None:
        """Take in what the gateway has sent. Waits for it, but not for ever while rows are kept or
        have to be taken back.
        """
        if self._closed:
            return
        if wait and (self._kept or self._undelivered):
            readable, _, _ = select.select([self._gateway], [], [], RETRY_SECONDS)
            wait = bool(readable)
        while True:
            try:
                piece = self._gateway.recv(_PIECE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                piece = b""
            if not piece:
                self._closed = True
                return
            self._received += piece
            self._take_frames()
            wait = wait and not self._queue and not self._undelivered

    def _take_frames(self) -> None:
        data, at = self._received, 0
        while len(data) - at >= FRAME.size:
            kind, number, length = FRAME.unpack_from(data, at)
            if len(data) - at < FRAME.size + length:
                break
            body = bytes(data[at + FRAME.size : at + FRAME.size + length])
            at += FRAME.size + length
            if kind == UNDELIVERED:
                self._take_back(body.decode())
                continue
            try:
                row = (started_json if kind == STARTED else ended_json).validate_json(body)
            except ValidationError:  # it has the values, which the log is not to have
                logger.error("Row not understood", extra={"action": "row_not_understood"})
                if kind == ENDED:
                    self._bury(json.loads(body))
                self._tell([number], "the writer does not understand this row", settled=1)
                continue
            entry = _Entry(number, row)
            if kind == ENDED:
                self._ends[row.id] = entry
            self._queue.append(entry)
        del data[:at]

    def _take_back(self, answer_id: str) -> None:
        if answer_id in self._ends:
            self._ends[answer_id].undelivered = True
        else:
            self._undelivered.append(answer_id)

    def _commit(self, group: list[_Entry]) -> None:
        try:
            self._write(group)
        except Exception as error:
            away = _database_is_away(self._database, error)
            if len(group) > 1 and not away:
                for entry in group:
                    self._commit([entry])
                return
            logger.exception(
                "Answers not recorded", extra={"action": "not_recorded", "rows": len(group)}
            )
            self._away = away
            for entry in group:
                self._ends.pop(entry.row.id, None)
                if away:
                    self._keep(entry)
                elif isinstance(entry.row, EndedAnswer):  # of a start nothing was answered
                    self._bury(asdict(entry.row))
            if not away and not group:
                self._undelivered.clear()
            self._report(group, str(error))
        else:
            self._away = False
            self.committed += len(group)
            for entry in group:
                self._ends.pop(entry.row.id, None)
            self._report(group, None)

    def _write(self, group: Sequence[_Entry]) -> None:
        # The start of an answer promises nothing to anybody: it may wait for the commit of an end.
        durable = bool(self._undelivered) or any(
            isinstance(entry.row, EndedAnswer) for entry in group
        )
        with self._writing.transaction(durable=durable) as driver:
            # It has waited for the write lock; who still waits for it is known after that.
            self._read(wait=False)
            later = list(self._undelivered)
            # An end that is sent twice, because a writer died, may have been committed by that one.
            undelivered = later + [entry.row.id for entry in group if entry.undelivered]
            rows = [entry.due() for entry in group]
            started = [row for row in rows if isinstance(row, StartedAnswer)]
            ended = [row for row in rows if isinstance(row, EndedAnswer)]
            if started:
                record_started(driver, started)
            if ended:
                record_ended(driver, ended)
            if undelivered:
                record_undelivered(driver, undelivered)
        del self._undelivered[: len(later)]

    def _keep(self, entry: _Entry) -> None:
        """Hold the end of an answer for later; its client is told that it is not recorded."""
        row = entry.row
        if isinstance(row, StartedAnswer):
            return  # its caller is told, and nothing was answered
        if len(self._kept) >= MOST_KEPT:
            self._bury(asdict(row))
            return
        kept = _Entry(0, as_undelivered(row), was_kept=True)
        # A connection that broke during COMMIT leaves open whether that was done.
        kept.undelivered = row.status is AnswerStatus.COMPLETE
        self._kept.append(kept)

    def _commit_kept(self) -> None:
        """Try the rows of a database that was away again, in groups, until one fails."""
        before = len(self._kept) + 1
        while self._kept and len(self._kept) < before:
            before = len(self._kept)
            size = min(self._largest_group, before)
            self._commit([self._kept.popleft() for _ in range(size)])

    def _bury(self, end: dict[str, Any]) -> None:
        """Keep the end of an answer that was refused for a person to look at; its row says so."""
        self.lost += 1
        if end["choices"]:  # what is refused once more has none
            failed = EndedAnswer(str(end["id"]), AnswerStatus.FAILED, [], error_code=NOT_RECORDED)
            self._queue.append(_Entry(0, failed, was_kept=True))
        try:
            self._dead_letters.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._dead_letters, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8") as file:
                file.write(json.dumps(end, default=str) + "\n")
        except OSError:
            logger.exception("Dead letter not written", extra={"action": "dead_letter_failed"})

    def _report(self, group: Sequence[_Entry], error: str | None) -> None:
        self._tell(
            [entry.number for entry in group if entry.number],
            error,
            settled=sum(not entry.was_kept for entry in group),
        )

    def _tell(self, numbers: list[int], error: str | None, *, settled: int) -> None:
        report = Report(
            numbers=numbers,
            error=error,
            settled=settled,
            committed=self.committed,
            lost=self.lost,
            kept=len(self._kept),
        )
        with contextlib.suppress(OSError):  # it has gone, and nobody waits any more
            self._gateway.sendall(report_json.dump_json(report) + b"\n")


def as_undelivered(row: AnyRow) -> AnyRow:
    """The row of an answer whose end the client was not sent after all."""
    if isinstance(row, EndedAnswer) and row.status is AnswerStatus.COMPLETE:
        return replace(row, status=AnswerStatus.INTERRUPTED, error_code=NOT_DELIVERED)
    return row


def _database_is_away(database: Database, error: Exception) -> bool:
    """Locked, full or unreachable: every row would fail alike, and each only after its own wait."""
    driver = database.engine.dialect.loaded_dbapi
    return isinstance(
        error,
        OperationalError | InterfaceError | driver.OperationalError | driver.InterfaceError,
    )


@contextlib.contextmanager
def writer_lock(path: Path | None) -> Iterator[None]:
    """Waits until no writer of an earlier gateway has rows left to write; None: nothing to wait
    for. Raises TimeoutError.
    """
    if path is None:
        yield
        return
    with path.open("a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"the writer of an earlier gateway still holds {path.name} after "
                        f"{LOCK_SECONDS:g} s; look for a process `server.writer` and end it"
                    ) from None
                time.sleep(0.02)  # the kernel tells nobody when a lock of another process is free
        yield


def main() -> int:
    """The process: reads its setup from the socket that it was given, then writes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends when the gateway closes the socket
    gateway = socket.socket(fileno=int(sys.argv[1]))
    head = _receive_exactly(gateway, FRAME.size)
    _, _, length = FRAME.unpack(head)
    setup = setup_json.validate_json(_receive_exactly(gateway, length))
    configure_logging(setup.log_level)
    collect_garbage_rarely()
    with writer_lock(None if setup.lock is None else Path(setup.lock)):
        database = Database(setup.database_url, pool_size=1)
        try:
            Writer(database, Path(setup.dead_letters), gateway).run()
        finally:
            database.dispose()
    return 0


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        piece = connection.recv(length - len(found))
        if not piece:
            raise SystemExit("the gateway went away before it said what to write to")
        found += piece
    return bytes(found)


if __name__ == "__main__":
    sys.exit(main())
