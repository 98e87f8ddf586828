"""One gateway leads: it alone does what must be done once, and its writes say in which term.

Owns: the lock by which one of several gateways leads, its term, and the fence around what the
leader writes. Covered: a leader that is killed, frozen, or thawed after another has taken over; a
database that goes away and comes back. Does not own: what a leader does, or the lock's connection
(`kept_lock.py`).

Engines know no term: whoever is about to call one looks at `is_leading` right before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from sqlalchemy import Connection, insert, text, update
from sqlalchemy.orm import Session

from feedback.db import Database
from server.cluster.kept_lock import KeptLock, beating
from server.tables import Control

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
TRUST_SECONDS = 4.0  #: since the last beat began; PostgreSQL frees the lock a second later
IDLE_SECONDS = 5.0  #: without a beat, after which PostgreSQL frees the lock
ANSWER_SECONDS = 3.0

CHANNEL = "burnish_control"  #: of notifications; what is said is the version

_LOCK = {"namespace": 0x6C656164, "key": 0}  # "lead"
_NOTIFY = text("SELECT pg_notify(:channel, :version)")
_LIMIT = text("SELECT set_config('idle_in_transaction_session_timeout', :milliseconds, true)")


class NotLeading(Exception):
    """Another gateway leads, or none: what was about to be written must not be."""


def awake() -> float:
    """Seconds of a clock that nobody sets, and that runs on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leader:
    """One gateway's part in who leads. `beat` and `close` block, one at a time.

    On SQLite there is one gateway, which leads from its first beat on. `is_wanted` says whether
    this gateway would lead at all: one that is stopping does not.
    """

    def __init__(
        self,
        database: Database,
        gateway_id: str,
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = awake,
    ) -> None:
        self._database = database
        self._id = gateway_id
        self._is_wanted = is_wanted
        self._clock = clock
        self._term: int | None = None  #: None: not leading
        self._beat_at = 0.0
        self._lock = (
            None
            if database.is_sqlite
            else KeptLock(
                database.direct_url,
                _LOCK,
                idle_seconds=IDLE_SECONDS,
                answer_seconds=ANSWER_SECONDS,
            )
        )

    def is_leading(self) -> bool:
        """Whether this gateway leads, as far as it can know by itself."""
        return self._find_term() is not None

    def beat(self) -> None:
        """Keep the lead, or take it where it is free. Raises what the database raises."""
        began = self._clock()  # before PostgreSQL hears of it, whose own count begins later
        if not self._is_wanted():
            self.close()
            return
        try:
            if self._lock is None:
                if self._term is None:
                    with self._database.write() as session:
                        term = _begin_term(session.connection(), self._id)
                    self._lead(term)
            elif self._lock.take():
                self._lose("its connection to the database broke")
                with self._lock.connection.begin():
                    term = _begin_term(self._lock.connection, self._id)
                self._lead(term)
            elif not self._lock.holds:
                self._lose("its connection to the database broke, and another gateway took over")
        except Exception as error:
            self._lose(f"the database failed: {type(error).__name__}")
            if self._lock is not None:
                self._lock.close()
            raise
        self._beat_at = began

    def close(self) -> None:
        """Give the lead back."""
        self._lose("given back", level=logging.INFO)
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction of the leader, which raises the version; listeners hear it at its commit.

        Raises NotLeading unless this gateway leads and nobody has begun another term; from there to
        the commit nobody can. A process that freezes in the block loses its transaction.
        """
        term = self._find_term()
        if term is None:
            raise NotLeading(f"gateway {self._id} does not lead")
        with self._database.write() as session:
            _limit(session.connection())
            raised = (
                update(Control)
                .where(Control.id == 1, Control.term == term)
                .values(version=Control.version + 1)
                .returning(Control.version)
            )
            version = session.scalar(raised)
            if version is None:
                raise NotLeading(f"gateway {self._id} led in term {term}, which has ended")
            _notify(session.connection(), version)
            yield session

    def _find_term(self) -> int | None:
        term = self._term
        is_fresh = self._lock is None or self._clock() - self._beat_at < TRUST_SECONDS
        return term if is_fresh and self._is_wanted() else None

    def _lead(self, term: int) -> None:
        self._term = term
        logger.info(
            "This gateway leads", extra={"action": "leading", "gateway": self._id, "term": term}
        )

    def _lose(self, why: str, *, level: int = logging.WARNING) -> None:
        term, self._term = self._term, None
        if term is not None:
            logger.log(
                level,
                "This gateway leads no more",
                extra={"action": "lead_lost", "gateway": self._id, "term": term, "reason": why},
            )


@asynccontextmanager
async def leading(leader: Leader) -> AsyncIterator[None]:
    """Lead whenever the lead is free, until the block ends."""
    failure = "The lead is not sought; tried again at every beat"
    async with beating(leader, BEAT_SECONDS, failure, action="lead_failed"):
        yield


def _begin_term(connection: Connection, gateway_id: str) -> int:
    """Raise the term, in a transaction of whoever has the lock: no earlier leader writes now."""
    _limit(connection)
    begun = (
        update(Control)
        .where(Control.id == 1)
        .values(term=Control.term + 1, version=Control.version + 1, leader=gateway_id)
        .returning(Control.term, Control.version)
    )
    row = connection.execute(begun).first()
    if row is None:
        connection.execute(insert(Control).values(id=1, term=1, version=1, leader=gateway_id))
    term, version = (1, 1) if row is None else row
    _notify(connection, version)
    return int(term)


def _limit(connection: Connection) -> None:
    """Have the transaction ended where this process freezes in it: it locks the row of the term."""
    if connection.dialect.name == "postgresql":
        connection.execute(_LIMIT, {"milliseconds": str(int(IDLE_SECONDS * 1000))})


def _notify(connection: Connection, version: int) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(_NOTIFY, {"channel": CHANNEL, "version": str(version)})
