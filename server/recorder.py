"""Writes answers to the database from one thread, in groups.

Owns: the writer thread, the groups, the dead-letter file. Covered: an answer's end is known to be
committed before it is released; a row that cannot be written does not take its neighbours along; a
database that is away for a while. Does not own: what is written (`feedback/answers.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sqlalchemy.exc import InterfaceError, OperationalError

from feedback.answers import EndedAnswer, StartedAnswer, record_ended, record_started
from feedback.db import Database
from feedback.tables import AnswerStatus

logger = logging.getLogger(__name__)

LARGEST_GROUP = 64
MOST_KEPT = 10_000  #: ends of answers that wait in memory for a database that is away
RETRY_SECONDS = 0.5

Row = StartedAnswer | EndedAnswer


class NotRecorded(Exception):
    """The row could not be committed."""


class Recorder:
    """One writer for the hot path. It commits at once what is queued and never lingers for more.

    Groups form by themselves, out of what arrives while a commit is under way. While the database
    is away whoever waits is told at once, and the ends of answers are kept and written later.
    `lost` counts rows that went to the dead-letter file.
    """

    def __init__(self, database: Database, dead_letters: Path) -> None:
        self._database = database
        self._dead_letters = dead_letters
        self._kept: deque[_Entry] = deque()
        self._away = False  #: the last commit did not reach the database
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.lost = 0
        self.committed = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Write what is queued, then end the thread."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    @property
    def depth(self) -> int:
        """Rows that wait."""
        return self._queue.qsize() + len(self._kept)

    async def record(self, row: Row) -> None:
        """Returns after COMMIT.

        Raises NotRecorded. Cancelling the wait does not take the row back.
        """
        entry = _Entry(row, asyncio.get_running_loop())
        self._queue.put(entry)
        assert entry.done is not None
        await entry.done

    def record_soon(self, row: EndedAnswer) -> None:
        """Queue a row whose commit nobody waits for: the client has gone."""
        self._queue.put(_Entry(row, None))

    def _run(self) -> None:
        ends = False
        while not ends:
            group, ends = self._next_group()
            if group:
                self._commit(group)
            if self._kept and not (group and self._away):
                self._commit_kept()
        while self._kept:
            self._bury(self._kept.popleft().row)

    def _next_group(self) -> tuple[list[_Entry], bool]:
        """What is queued, and whether that is the end. Waits; not for ever while rows are kept."""
        group: list[_Entry] = []
        try:
            entry = self._queue.get(timeout=RETRY_SECONDS if self._kept else None)
            while entry is not None:
                group.append(entry)
                if len(group) == LARGEST_GROUP:
                    return group, False
                entry = self._queue.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _commit(self, group: list[_Entry]) -> None:
        try:
            self._write(group)
        except Exception as error:
            away = _database_is_away(error)
            if len(group) > 1 and not away:
                for entry in group:
                    self._commit([entry])
                return
            logger.exception(
                "Answers not recorded", extra={"action": "not_recorded", "rows": len(group)}
            )
            self._away = away
            for entry in group:
                if away:
                    self._keep(entry)
                else:
                    self._bury(entry.row)
            _settle(group, NotRecorded(str(error)))
        else:
            self._away = False
            self.committed += len(group)
            _settle(group, None)

    def _keep(self, entry: _Entry) -> None:
        """Hold the end of an answer for later; its client is told that it is not recorded."""
        if isinstance(entry.row, StartedAnswer):
            return  # its caller is told, and nothing was answered
        if len(self._kept) >= MOST_KEPT:
            self._bury(entry.row)
        else:
            self._kept.append(_Entry(_undelivered(entry.row), None))

    def _commit_kept(self) -> None:
        """Try the rows of a database that was away again, in groups, until one fails."""
        before = len(self._kept) + 1
        while self._kept and len(self._kept) < before:
            before = len(self._kept)
            size = min(LARGEST_GROUP, before)
            self._commit([self._kept.popleft() for _ in range(size)])

    def _write(self, group: Sequence[_Entry]) -> None:
        with self._database.write() as session:
            session.connection()  # waits for the write lock; who still waits is known after that
            rows = [entry.due() for entry in group]
            started = [row for row in rows if isinstance(row, StartedAnswer)]
            ended = [row for row in rows if isinstance(row, EndedAnswer)]
            if started:
                record_started(session, started)
            if ended:
                record_ended(session, ended)

    def _bury(self, row: Row) -> None:
        """Keep the end of an answer that the database refused, for a person to look at."""
        if isinstance(row, StartedAnswer):
            return  # its caller is told, and nothing was answered
        self.lost += 1
        try:
            self._dead_letters.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._dead_letters, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row), default=str) + "\n")
        except OSError:
            logger.exception("Dead letter not written", extra={"action": "dead_letter_failed"})


def _undelivered(row: Row) -> Row:
    """The row of an answer whose end the client was not sent after all."""
    if isinstance(row, EndedAnswer) and row.status is AnswerStatus.COMPLETE:
        return replace(row, status=AnswerStatus.INTERRUPTED, error_code="not_delivered")
    return row


class _Entry:
    """A row and the future that its commit resolves, in the loop that waits for it."""

    __slots__ = ("done", "loop", "row")

    def __init__(self, row: Row, loop: asyncio.AbstractEventLoop | None) -> None:
        self.row = row
        self.loop = loop
        self.done: asyncio.Future[None] | None = None if loop is None else loop.create_future()

    def due(self) -> Row:
        """The row to write: whoever has stopped waiting for it does not release the answer."""
        if self.done is not None and self.done.cancelled():
            return _undelivered(self.row)
        return self.row


def _settle(group: Sequence[_Entry], error: NotRecorded | None) -> None:
    loops = {entry.loop for entry in group if entry.loop is not None}
    for loop in loops:
        futures = [entry.done for entry in group if entry.loop is loop and entry.done is not None]
        try:
            loop.call_soon_threadsafe(_resolve, futures, error)
        except RuntimeError:
            logger.warning(
                "Event loop closed before its rows were committed", extra={"action": "loop_closed"}
            )


def _resolve(futures: Sequence[asyncio.Future[None]], error: NotRecorded | None) -> None:
    for future in futures:
        if future.done():
            continue  # its request was cancelled
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _database_is_away(error: Exception) -> bool:
    """Locked, full or unreachable: every row would fail alike, and each only after its own wait."""
    return isinstance(error, OperationalError | InterfaceError)
