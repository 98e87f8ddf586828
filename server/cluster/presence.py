"""Which gateways of one PostgreSQL database live, and the answers of those that do not.

Owns: a gateway's sign of life, and when another one counts as dead. Covered: a gateway that is
killed, frozen or cut off, with its machine or without; a database that was away, for one gateway or
for all. Does not own: the lock and its connection (`kept_lock.py`); how answers are ended
(`feedback/recording.py`); SQLite, whose one gateway ends at its start what an earlier one left
(`gateway.py`).
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from feedback.db import Database
from feedback.recording import interrupt_started
from server.cluster.kept_lock import KeptLock, beating

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
GRACE_SECONDS = 15.0  #: a lock that was lost is taken again at the next beat, long before this
IDLE_SECONDS = 30.0  #: of missed beats, after which PostgreSQL frees the lock
ANSWER_SECONDS = 10.0

_NAMESPACE = 0x67617465  # "gate"
_HOLD_TO_END = text("SELECT pg_try_advisory_xact_lock(:namespace, :key)")
# Shared: observers that look at the same time don't take each other for the gateway.
_LOOK = text("SELECT pg_try_advisory_xact_lock_shared(:namespace, :key)")
_OTHERS = text("SELECT DISTINCT gateway FROM answers WHERE status = 'started' AND gateway <> :own")


@asynccontextmanager
async def present(database: Database, gateway_id: str) -> AsyncIterator[None]:
    """Be seen to live until the block ends, and see to the answers of gateways that do not.

    On SQLite nothing: there is one gateway.
    """
    if database.is_sqlite:
        yield
        return
    failure = "Other gateways not looked at; tried again at every beat"
    presence = Presence(database, gateway_id)
    async with beating(presence, BEAT_SECONDS, failure, action="presence_failed"):
        yield


class Presence:
    """A gateway lives for others as long as it holds an advisory lock.

    Others take a gateway for dead when they found its lock free at every look for `GRACE_SECONDS`
    of their own `clock`. All calls block, one at a time.
    """

    def __init__(
        self, database: Database, gateway_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._id = gateway_id
        self._clock = clock
        self._lock = KeptLock(
            database.direct_url,
            _lock_of(gateway_id),
            idle_seconds=IDLE_SECONDS,
            answer_seconds=ANSWER_SECONDS,
        )
        self._free_since: dict[str, float] = {}

    def beat(self) -> None:
        """Keep this gateway's lock, and end the answers of gateways that are dead.

        The lock is taken on a new connection where the old one broke. Raises what the database
        raises; then others' locks may have been lost with it, and each gateway is given the whole
        time again.
        """
        try:
            self._lock.take()
            for gateway in self._find_dead(self._lock.connection):
                self._end(self._lock.connection, gateway)
        except Exception:
            self._free_since.clear()
            raise

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

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


def _lock_of(gateway_id: str) -> dict[str, int]:
    return {"namespace": _NAMESPACE, "key": zlib.crc32(gateway_id.encode()) - 2**31}
