"""Queues answer rows for the writer and awaits their commit.

Owns: the gateway's side of the writer (`writer.py`): who waits for which row, and the writer's
life. Covered: an answer's end is known to be committed before it is released; a wait that ends
early; a writer that dies. Does not own: how rows are written.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from feedback.db import Database
from feedback.recording import EndedAnswer, StartedAnswer
from feedback.tables import AnswerStatus
from server.chat.frames import (
    ENDED,
    SETUP,
    STARTED,
    UNDELIVERED,
    Report,
    Setup,
    as_sent_before,
    as_undelivered,
    ended_json,
    setup_json,
    started_json,
)
from server.chat.link import Link
from server.chat.writer import MOST_KEPT, Writer

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
STOP_SECONDS = 25.0  #: a database that is locked is waited for twice
MOST_UNSENT_BYTES = 64 * 1024 * 1024  #: a writer that is so far behind gets nothing new
RESTART_SECONDS = 1.0


NO_REPORT = Report([], [], None, 0, 0, 0, 0, away=False)


class NotRecorded(Exception):
    """The row could not be committed."""


class NotSent(NotRecorded):
    """The writer was never told of it."""


class RefersToNothing(NotRecorded):
    """What the row refers to is gone, as a person that was erased."""


class Recorder:
    """One writer for the hot path. One event loop owns it.

    `own_process`: the writer runs as a process of its own, with `lock` as its lock file; otherwise
    in a thread. `lost` counts rows that went to the dead-letter file, `committed` those that were
    written.
    """

    def __init__(
        self,
        database: Database,
        dead_letters: Path,
        *,
        own_process: bool = False,
        lock: Path | None = None,
        log_level: str = "info",
    ) -> None:
        self._database = database
        self._dead_letters = dead_letters
        self._own_process = own_process
        self._lock = lock
        self._log_level = log_level
        self._link: Link | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._there = asyncio.Event()  #: set while there is a writer
        #: ends, or what takes one back, that a writer had not said to have written when it died
        self._owed: deque[_Sent] = deque()
        self._before = (0, 0)  #: committed and lost by writers that are gone
        self._last = NO_REPORT
        self._number = 0
        self._unsettled = 0
        self._waiting: dict[int, _Sent] = {}
        self._stopping = False
        self._connected_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.writer: Writer | None = None  #: where it runs in a thread

    async def start(self) -> None:
        """Returns when the writer is ready. Raises RuntimeError where it can't be started."""
        self._begin(await self._connect())

    def _begin(self, link: Link) -> None:
        self._link = link
        self._there.set()

    async def stop(self) -> None:
        """Have everything written that was sent, then end the writer."""
        self._stopping = True
        if self._restarting is not None:
            await asyncio.wait([self._restarting], timeout=STOP_SECONDS)
            self._restarting.cancel()
        if self._link is not None:
            link, self._link = self._link, None
            self._there.clear()
            link.finish()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await link.ended.wait()
            except TimeoutError:
                logger.error("The writer did not end", extra={"action": "writer_stuck"})
                if self.process is not None:
                    self.process.kill()
            if self.process is not None:
                await asyncio.to_thread(self.process.wait)
        lost = len(self._owed) + sum(isinstance(s.row, EndedAnswer) for s in self._waiting.values())
        if lost:
            logger.error(
                "Ends of answers may be lost: no writer has said that it wrote them",
                extra={"action": "ends_lost", "rows": lost},
            )

    @property
    def depth(self) -> int:
        """Rows that wait."""
        return self._unsettled + self._last.kept + len(self._owed)

    @property
    def committed(self) -> int:
        return self._before[0] + self._last.committed

    @property
    def lost(self) -> int:
        return self._before[1] + self._last.lost

    async def record(self, row: StartedAnswer | EndedAnswer, timeout_seconds: float) -> None:
        """Returns after COMMIT.

        Raises NotRecorded, after `timeout_seconds` at the latest. Whoever stops waiting for the end
        of a complete answer, by that or by being cancelled, does not send it: the row says so.
        While the writer is away another one is being started, and this waits for it.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        deadline = loop.time() + timeout_seconds
        if self._link is None:
            await self._wait_for_writer(row, deadline)
        number = self._send(row, done)
        timer = loop.call_at(deadline, _expire, done)
        try:
            await done
        except NotRecorded:
            raise  # the writer has seen to it
        except BaseException as error:
            if isinstance(row, StartedAnswer) and self._withdraw(number):
                if isinstance(error, TimeoutError):
                    raise NotSent(f"the writer is {timeout_seconds:g} s behind") from None
                raise
            # It goes on waiting in `_waiting`: should the writer die, the next one gets it.
            if isinstance(row, EndedAnswer) and row.status is AnswerStatus.COMPLETE:
                self.take_back(row)
            if isinstance(error, TimeoutError):
                raise NotRecorded(f"not committed within {timeout_seconds:g} s") from None
            raise
        finally:
            timer.cancel()

    async def check(self, timeout_seconds: float) -> None:
        """Returns where the writer can write, as far as is known; raises NotSent where it can't.

        Known is its last commit, and for how long it has said nothing of what it has: half of what
        a request waits for its commit is too long. Waits only for a writer that is being started.
        """
        link = self._link
        if link is None:
            await self._wait_for_writer(None, asyncio.get_running_loop().time() + timeout_seconds)
            return
        if self._last.away:
            raise NotSent("the database is away")
        if link.unsent_bytes > MOST_UNSENT_BYTES or link.silent_seconds() > timeout_seconds / 2:
            raise NotSent("the writer is too far behind")

    def record_soon(self, row: EndedAnswer) -> None:
        """Have a row written whose commit nobody waits for: the client has gone."""
        if self._link is None:
            self._owe(_Sent(row, None))
        else:
            self._send(row, None)

    async def _wait_for_writer(
        self, row: StartedAnswer | EndedAnswer | None, deadline: float
    ) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                while self._link is None:
                    if self._stopping:
                        raise TimeoutError
                    await self._there.wait()
        except BaseException as error:
            if isinstance(row, EndedAnswer):
                self.record_soon(as_undelivered(row))  # there may be a writer by now
            if isinstance(error, TimeoutError):
                raise NotSent("the writer is not there; it is being started") from None
            raise

    def _send(self, row: StartedAnswer | EndedAnswer, done: asyncio.Future[None] | None) -> int:
        assert self._link is not None
        if isinstance(row, StartedAnswer) and self._link.unsent_bytes > MOST_UNSENT_BYTES:
            raise NotSent("the writer is too far behind")
        # A warning would have the values; the writer refuses what isn't of its form.
        if isinstance(row, StartedAnswer):
            kind, body = STARTED, started_json.dump_json(row, warnings=False)
        else:
            kind, body = ENDED, ended_json.dump_json(row, warnings=False)
        return self._send_frame(kind, body, _Sent(row, done))

    def _send_frame(self, kind: int, body: bytes, sent: _Sent) -> int:
        """Queue a frame for the writer; the number that reports name it by."""
        assert self._link is not None
        self._number += 1
        self._unsettled += 1
        self._waiting[self._number] = sent
        self._link.send(kind, self._number, body)
        return self._number

    def _withdraw(self, number: int) -> bool:
        """Take a row that nobody waits for out of the queue; False where the writer may have it.

        After an outage the writer then begins with what is still of use.
        """
        if self._link is None or not self._link.withdraw(number):
            return False
        self._unsettled -= 1
        del self._waiting[number]
        return True

    def _owe(self, end: _Sent) -> None:
        if len(self._owed) < MOST_KEPT:
            self._owed.append(end)
        else:
            self._before = (self._before[0], self._before[1] + 1)
            end.fail("too many ends of answers wait for a writer")

    def take_back(self, row: EndedAnswer) -> None:
        """The end of a complete answer was not sent after all: its row is to say so."""
        sent = _Sent(row, None)  # until it is done: should the writer die, the next one is told
        if self._link is not None:
            self._send_frame(UNDELIVERED, row.id.encode(), sent)
        else:
            self._owe(sent)

    # The writer's life

    async def _connect(self) -> Link:
        ours, theirs = socket.socketpair()
        if self._own_process:
            if self.process is not None:
                self.process.wait()  # it has ended: its end of the socket is closed
            self.process = subprocess.Popen(  # noqa: ASYNC220 - a start, of milliseconds
                [sys.executable, "-P", "-m", "server.chat.writer", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the gateway's
            )
            theirs.close()
        else:
            self.writer = Writer(self._database, self._dead_letters, theirs)
            threading.Thread(
                target=_run, args=(self.writer, theirs), name="writer", daemon=True
            ).start()
        self._connected_at = time.monotonic()
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(
            lambda: Link(self._settle, self._writer_ended), sock=ours
        )
        if self._own_process:
            setup = Setup(
                database_url=self._database.url.render_as_string(hide_password=False),
                dead_letters=str(self._dead_letters),
                lock=None if self._lock is None else str(self._lock),
                log_level=self._log_level,
            )
            link.send(SETUP, 0, setup_json.dump_json(setup))
        try:
            async with asyncio.timeout(START_SECONDS):
                await link.ready.wait()
            if not link.ended.is_set():
                return link
            why = "the writer ended before it was ready; its log says why"
        except TimeoutError:
            why = f"the writer was not ready after {START_SECONDS:g} s"
        except BaseException:
            self._abandon(link)
            raise
        self._abandon(link)
        if self.process is not None:
            await asyncio.to_thread(self.process.wait)
        raise RuntimeError(why)

    def _abandon(self, link: Link) -> None:
        link.close()
        if self.process is not None:
            self.process.kill()

    def _settle(self, report: Report) -> None:
        self._last = report
        self._unsettled -= report.settled
        for number in report.numbers:
            sent = self._waiting.pop(number, None)
            if sent is not None:
                sent.settle(report)
        for number in report.kept_numbers:
            if number in self._waiting:
                self._waiting[number].settle(report)

    def _writer_ended(self, link: Link) -> None:
        """Leave what it may not have written to the next writer.

        Nobody knows whether it wrote a start, so whoever waits for one is told.
        """
        if self._link is not link:
            return
        self._link = None
        self._there.clear()
        logger.error("The writer has ended", extra={"action": "writer_ended"})
        self._before = (self.committed, self.lost)
        self._last = NO_REPORT
        self._unsettled = 0
        waiting, self._waiting = self._waiting, {}
        for sent in waiting.values():
            if isinstance(sent.row, EndedAnswer):
                self._owe(sent)
            else:
                sent.fail("the writer ended before it had committed this")
        if not self._stopping:
            self._restarting = asyncio.ensure_future(self._restart())

    async def _restart(self) -> None:
        if time.monotonic() - self._connected_at < RESTART_SECONDS:
            await asyncio.sleep(RESTART_SECONDS)  # one that dies at once is not started at once
        while True:
            try:
                self._begin(await self._connect())
                break
            except (OSError, RuntimeError):
                logger.exception("No new writer", extra={"action": "writer_not_started"})
                await asyncio.sleep(RESTART_SECONDS)  # what is wrong takes a while to be put right
        logger.info("A new writer is there", extra={"action": "writer_started"})
        while self._owed and self._link is not None:
            owed = self._owed.popleft()
            assert isinstance(owed.row, EndedAnswer)
            row = as_sent_before(owed.row)
            if owed.is_awaited:
                self._send(row, owed.done)  # the one that died may have: then it stays so
                continue
            self._send(as_undelivered(row), None)
            if owed.row.status is AnswerStatus.COMPLETE:
                self.take_back(owed.row)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A row that the writer has, or is to have, and whoever waits for its commit.

    Without anybody who waits, a complete answer's end is one that has been taken back.
    """

    row: StartedAnswer | EndedAnswer
    done: asyncio.Future[None] | None  #: None: nobody

    @property
    def is_awaited(self) -> bool:
        return self.done is not None and not self.done.done()

    def settle(self, report: Report) -> None:
        if report.error is not None:
            self.fail(report.error, RefersToNothing if report.refers_to_nothing else NotRecorded)
        elif self.done is not None and not self.done.done():
            self.done.set_result(None)

    def fail(self, why: str, kind: type[NotRecorded] = NotRecorded) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(kind(why))


def _run(writer: Writer, gateway: socket.socket) -> None:
    with gateway:
        writer.run()


def _expire(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_exception(TimeoutError())
