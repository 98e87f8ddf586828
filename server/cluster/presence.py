"""Which gateways of one PostgreSQL database live, and the answers of those that do not.

Owns: a gateway's sign of life, and when another one counts as dead. Covered: a gateway that is
killed, frozen or cut off, with its machine or without; a database that was away, for one gateway or
for all. Not covered: a pooler that gives each transaction another connection (PgBouncer's mode
`transaction`), since the lock is a connection's. Does not own: how answers are ended
(`feedback/recording.py`); SQLite, whose one gateway ends at its start what an earlier one left
(`gateway.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from feedback.db import Database
from feedback.recording import interrupt_started

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
GRACE_SECONDS = 15.0  #: a lock that was lost is taken again at the next beat, long before this
IDLE_SECONDS = 30.0
"""PostgreSQL (from 14 on) ends a connection that has missed so many seconds of beats: of a machine
without power no packet tells it that the gateway is dead."""
CONNECT_SECONDS = 5
ANSWER_SECONDS = 10.0  #: for a statement, and for the server's machine to confirm a packet

_NAMESPACE = 0x67617465  # "gate"; single 64-bit keys, as others here take, are apart from pairs
_HOLD = text("SELECT pg_try_advisory_lock(:namespace, :key)")
_HOLD_TO_END = text("SELECT pg_try_advisory_xact_lock(:namespace, :key)")
# Shared: observers that look at the same time don't take each other for the gateway.
_LOOK = text("SELECT pg_try_advisory_xact_lock_shared(:namespace, :key)")
_OTHERS = text("SELECT DISTINCT gateway FROM answers WHERE status = 'started' AND gateway <> :own")
_SET = text(
    "SELECT set_config(name, :milliseconds, false) FROM pg_settings WHERE name = :name"
)  # what this PostgreSQL does not know stays unset


@asynccontextmanager
async def present(database: Database, gateway_id: str) -> AsyncIterator[None]:
    """Be seen to live until the block ends, and see to the answers of gateways that do not.

    On SQLite nothing: there is one gateway.
    """
    if database.is_sqlite:
        yield
        return
    presence, stopping = Presence(database, gateway_id), asyncio.Event()
    is_away = not await _try_beat(presence)
    beats = asyncio.create_task(_beat_until(stopping, presence, is_away))
    try:
        yield
    finally:
        stopping.set()  # not cancelled: the thread of a beat would go on beside `close`
        await beats
        await asyncio.to_thread(presence.close)


class Presence:
    """A gateway lives for others as long as it holds an advisory lock.

    It holds it on a connection of its own, and PostgreSQL frees it with that connection, whatever
    ends it. Others take a gateway for dead when they found its lock free at every look for
    `GRACE_SECONDS` of their own `clock`. All calls block, one at a time.
    """

    def __init__(
        self, database: Database, gateway_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._id = gateway_id
        self._clock = clock
        self._engine = create_engine(
            database.url,
            poolclass=NullPool,
            pool_reset_on_return=None,  # a connection that is given back is closed
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "tcp_user_timeout": int(ANSWER_SECONDS * 1000),
            },
        )
        self._connection: Connection | None = None
        self._holds = False
        self._free_since: dict[str, float] = {}

    def beat(self) -> None:
        """Keep this gateway's lock, and end the answers of gateways that are dead.

        The lock is taken on a new connection where the old one broke. Raises what the database
        raises; then others' locks may have been lost with it, and each gateway is given the whole
        time again.
        """
        try:
            connection = self._connect()
            if not self._holds:
                with connection.begin():
                    self._holds = connection.scalar(_HOLD, _lock_of(self._id)) is True
            for gateway in self._find_dead(connection):
                self._end(connection, gateway)
        except Exception:
            self._free_since.clear()
            raise

    def close(self) -> None:
        """Give the lock back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> Connection:
        if self._connection is not None and not _is_connected(self._connection):
            self.close()
        if self._connection is None:
            self._holds = False
            self._connection = self._engine.connect()
            try:
                _limit(self._connection)
            except BaseException:
                self.close()
                raise
        return self._connection

    def _find_dead(self, connection: Connection) -> list[str]:
        """Gateways that left answers `started` and whose lock has been free for long enough."""
        now = self._clock()
        with connection.begin():
            self._free_since = {
                gateway: self._free_since.get(gateway, now)
                for gateway in connection.scalars(_OTHERS, {"own": self._id}).all()
                if connection.scalar(_LOOK, _lock_of(gateway))
            }
        return [
            gateway for gateway, since in self._free_since.items() if now - since >= GRACE_SECONDS
        ]

    def _end(self, connection: Connection, gateway: str) -> None:
        with Session(connection) as session, session.begin():
            if not session.scalar(_HOLD_TO_END, _lock_of(gateway)):
                return  # it lives after all, or another observer is at it: the next look tells
            left = interrupt_started(session, gateway)
        del self._free_since[gateway]
        if left:
            logger.warning(
                "Answers of a stopped gateway ended",
                extra={"action": "leftovers_ended", "gateway": gateway, "answers": left},
            )


def _limit(connection: Connection) -> None:
    limits = {"idle_session_timeout": IDLE_SECONDS, "statement_timeout": ANSWER_SECONDS}
    with connection.begin():
        for name, seconds in limits.items():
            connection.execute(_SET, {"name": name, "milliseconds": str(int(seconds * 1000))})


def _is_connected(connection: Connection) -> bool:
    if connection.invalidated:
        return False  # used again it would connect by itself, and not hold the lock
    try:
        with connection.begin():
            connection.exec_driver_sql("SELECT 1")
    except DBAPIError:
        return False
    return True


async def _beat_until(stopping: asyncio.Event, presence: Presence, is_away: bool) -> None:
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), BEAT_SECONDS)
        if stopping.is_set():
            return
        is_away = not await _try_beat(presence, was_away=is_away)


async def _try_beat(presence: Presence, *, was_away: bool = False) -> bool:
    """Whether it succeeded. What fails time and again is logged once."""
    try:
        await asyncio.to_thread(presence.beat)
    except Exception:
        if not was_away:
            logger.exception(
                "Other gateways not looked at; tried again at every beat",
                extra={"action": "presence_failed"},
            )
        return False
    return True


def _lock_of(gateway_id: str) -> dict[str, int]:
    """A pair of signed 32-bit numbers."""
    return {"namespace": _NAMESPACE, "key": zlib.crc32(gateway_id.encode()) - 2**31}
