"""Commits what a gateway records, in groups, on the other side of a socket.

`python -P -m server.chat.writer FD`: a process of its own, so that it shares no interpreter lock
with the requests; `Writer` alone also runs in a thread. Owns: the groups, the dead-letter file,
what happens while the database is away. Covered: a row that cannot be written does not take its
neighbours along; a gateway that is killed (what it had sent is written, then this ends); an answer
whose end was not sent after all. Does not own: what is written (`feedback/recording.py`), who waits
for it (`recorder.py`), how the two speak (`frames.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
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
from server.chat.dead_letters import add_letter
from server.chat.frames import (
    ENDED,
    FRAME,
    STARTED,
    UNDELIVERED,
    Report,
    Row,
    TakenBack,
    as_sent_before,
    as_undelivered,
    ended_json,
    report_json,
    setup_json,
    started_json,
)
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


class _Entry:
    __slots__ = ("number", "row", "undelivered", "was_kept")

    def __init__(self, number: int, row: Row, *, was_kept: bool = False) -> None:
        self.number = number
        self.row = row
        self.was_kept = was_kept
        self.undelivered = False

    def due(self) -> Row:
        """The row to write: interrupted where the client was not sent the end of the answer."""
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
        self._ends: dict[str, _Entry] = {}  #: the last one queued, by answer
        self._kept: deque[_Entry] = deque()
        self._largest_group = LARGEST_SQLITE_GROUP if database.is_sqlite else LARGEST_GROUP
        self._away = False  #: the last commit did not reach the database
        self._closed = False
        self.lost = 0
        self.committed = 0

    def run(self) -> None:
        """Write until the gateway closes its end, then what has come before that."""
        self._tell([], None)  # there, and ready
        while not (self._closed and not self._queue):
            self.turn()
        self._give_up()
        self._writing.close()

    def _give_up(self) -> None:
        """Leave what is still kept to a person, in the dead-letter file."""
        left = list(self._kept)
        self._kept.clear()
        ends = {entry.row.id: entry.row for entry in left if isinstance(entry.row, EndedAnswer)}
        for entry in left:
            if entry.row.id not in ends:
                ends[entry.row.id] = EndedAnswer(
                    entry.row.id, AnswerStatus.INTERRUPTED, [], error_code=NOT_DELIVERED
                )
        for end in ends.values():
            self._bury(asdict(end))
        if left:
            self._report(left, "the gateway ended before the database was back")

    def turn(self, *, wait: bool = True) -> None:
        """Take in what has come, commit one group of it, then what was kept before.

        Waits for something to come only where nothing is queued.
        """
        self._read(wait=wait and not self._queue)
        group = [self._queue.popleft() for _ in range(min(self._largest_group, len(self._queue)))]
        if group:
            self._commit(group)
        if self._kept and not (group and self._away):
            self._commit_kept()
        elif self._away and not group:
            self._look_for_database()

    def _look_for_database(self) -> None:
        """Whether it is back: while the gateway believes it away, nothing comes that would show."""
        try:
            with self._writing.transaction(durable=True):
                pass
        except Exception as error:
            self._log_failure(error, 0, again=True)
        else:
            self._away = False
            self._tell([], None)

    def _read(self, *, wait: bool) -> None:
        """Take in what the gateway has sent. Waits for it, but not for ever while it is away."""
        if self._closed:
            return
        if wait and (self._kept or self._away):
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
            wait = wait and not self._queue

    def _take_frames(self) -> None:
        data, at = self._received, 0
        while len(data) - at >= FRAME.size:
            kind, number, length = FRAME.unpack_from(data, at)
            if len(data) - at < FRAME.size + length:
                break
            body = bytes(data[at + FRAME.size : at + FRAME.size + length])
            at += FRAME.size + length
            if kind == UNDELIVERED:
                self._take_back(number, TakenBack(body.decode()))
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

    def _take_back(self, number: int, row: TakenBack) -> None:
        # Queued behind the end, whatever becomes of that; one that still waits is not even written
        # as complete.
        if row.id in self._ends:
            self._ends[row.id].undelivered = True
        self._queue.append(_Entry(number, row))

    def _commit(self, group: list[_Entry]) -> None:
        try:
            self._write(group)
        except Exception as error:
            away = _database_is_away(self._database, error)
            if len(group) > 1 and not away:
                for entry in group:
                    self._commit([entry])
                return
            self._log_failure(error, len(group), again=away and self._away)
            self._away = away
            self._forget(group)
            gone = _refers_to_nothing(error)
            kept = [entry for entry in group if self._was_kept(entry, away=away, gone=gone)]
            self._report(group, str(error), kept, refers_to_nothing=gone)
        else:
            self._away = False
            self.committed += sum(not isinstance(entry.row, TakenBack) for entry in group)
            self._forget(group)
            self._report(group, None)

    def _forget(self, group: Sequence[_Entry]) -> None:
        """Ends that wait no longer."""
        for entry in group:
            if self._ends.get(entry.row.id) is entry:
                del self._ends[entry.row.id]

    def _log_failure(self, error: Exception, rows: int, *, again: bool) -> None:
        """What fails time and again, because the database is away, is explained once."""
        logger.log(
            logging.WARNING if again else logging.ERROR,
            "Answers not recorded",
            extra={"action": "not_recorded", "rows": rows},
            exc_info=None if again else error,
        )

    def _write(self, group: Sequence[_Entry]) -> None:
        # The start of an answer promises nothing to anybody: it may wait for the commit of an end.
        durable = not all(isinstance(entry.row, StartedAnswer) for entry in group)
        with self._writing.transaction(durable=durable) as driver:
            # It has waited for the write lock; who still waits for it is known after that.
            self._read(wait=False)
            rows = [entry.due() for entry in group]
            started = [row for row in rows if isinstance(row, StartedAnswer)]
            ended = [row for row in rows if isinstance(row, EndedAnswer)]
            # An end that was sent before may have been committed by that transaction.
            taken_back = [
                entry.row.id
                for entry in group
                if entry.undelivered or isinstance(entry.row, TakenBack)
            ]
            if started:
                record_started(driver, started)
            if ended:
                record_ended(driver, ended)
            if taken_back:
                record_undelivered(driver, taken_back)

    def _was_kept(self, entry: _Entry, *, away: bool, gone: bool) -> bool:
        """Keep a row that was not written for later, or put it into the dead-letter file.

        Its client is told that it is not recorded. What takes an end back, or says of one that it
        could not be written, is kept until it is, however often that fails: it is small, and there
        is no more of it than requests that ran at once. Of a person who is `gone` nothing is kept.
        """
        row = entry.row
        if isinstance(row, StartedAnswer):
            return False  # of a start nothing was answered
        if (
            isinstance(row, EndedAnswer)
            and row.start is not None
            and not away
            and (gone or row.says_only(NOT_RECORDED))
        ):
            return False  # nothing may be kept of it, or not even that can be written
        if isinstance(row, TakenBack) or row.says_only(NOT_RECORDED):
            self._keep(entry)
            return True
        # A connection that broke during COMMIT leaves open whether that was done.
        entry.undelivered = entry.undelivered or (away and row.status is AnswerStatus.COMPLETE)
        if not away or len(self._kept) >= MOST_KEPT:
            self._bury(asdict(entry.due()), row.start)
            if entry.undelivered:
                self._queue.append(_Entry(0, TakenBack(row.id), was_kept=True))
            return False
        self._keep(entry)
        return True

    def _keep(self, entry: _Entry) -> None:
        # Not the entry itself: the group's report is to know that it was new. A connection that
        # broke may have committed it.
        kept = _Entry(entry.number, as_sent_before(entry.due()), was_kept=True)
        kept.undelivered = entry.undelivered
        self._kept.append(kept)

    def _commit_kept(self) -> None:
        """Try the rows of a database that was away again, in groups, until one fails."""
        before = len(self._kept) + 1
        while self._kept and len(self._kept) < before:
            before = len(self._kept)
            size = min(self._largest_group, before)
            self._commit([self._kept.popleft() for _ in range(size)])

    def _bury(self, end: dict[str, Any], start: StartedAnswer | None = None) -> None:
        """Keep the end of an answer that was refused for a person to look at; its row says so."""
        self.lost += 1
        failed = EndedAnswer(str(end["id"]), AnswerStatus.FAILED, [], error_code=NOT_RECORDED)
        if start is not None:  # what was refused may have been one of its texts
            failed.start = replace(start, stored=False, messages=[], tools=None, metadata={})
            failed.start_may_be_there = True
        self._queue.append(_Entry(0, failed, was_kept=True))
        try:
            add_letter(self._dead_letters, end)
        except OSError:
            logger.exception("Dead letter not written", extra={"action": "dead_letter_failed"})

    def _report(
        self,
        group: Sequence[_Entry],
        error: str | None,
        kept: Sequence[_Entry] = (),
        *,
        refers_to_nothing: bool = False,
    ) -> None:
        kept_numbers = [entry.number for entry in kept if entry.number]
        self._tell(
            [n for n in (entry.number for entry in group) if n and n not in kept_numbers],
            error,
            kept_numbers=kept_numbers,
            settled=sum(not entry.was_kept for entry in group),
            refers_to_nothing=refers_to_nothing,
        )

    def _tell(
        self,
        numbers: list[int],
        error: str | None,
        *,
        kept_numbers: Sequence[int] = (),
        settled: int = 0,
        refers_to_nothing: bool = False,
    ) -> None:
        report = Report(
            numbers=numbers,
            kept_numbers=list(kept_numbers),
            error=error,
            settled=settled,
            committed=self.committed,
            lost=self.lost,
            kept=len(self._kept),
            away=self._away,
            refers_to_nothing=refers_to_nothing,
        )
        with contextlib.suppress(OSError):  # it has gone, and nobody waits any more
            self._gateway.sendall(report_json.dump_json(report) + b"\n")


def _database_is_away(database: Database, error: Exception) -> bool:
    """Locked, full, read-only or away: every row would fail alike, each only after its own wait."""
    driver = database.engine.dialect.loaded_dbapi
    return isinstance(
        error,
        OperationalError
        | InterfaceError
        | driver.OperationalError
        | driver.InterfaceError
        | driver.InternalError,  # PostgreSQL's word for one that has become a standby
    )


def _refers_to_nothing(error: Exception) -> bool:
    """Whether a foreign key was refused: a person of the row has been erased, for one."""
    return getattr(error, "sqlstate", None) == "23503" or "FOREIGN KEY" in str(error)


@contextlib.contextmanager
def writer_lock(path: Path | None) -> Iterator[None]:
    """Wait until no writer of an earlier gateway has rows left to write, then hold the lock.

    None: there is nothing to wait for. Raises TimeoutError.
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
                        f"{LOCK_SECONDS:g} s; look for a process `server.chat.writer` and end it"
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
