"""An advisory lock of PostgreSQL that one process keeps, on a connection of its own.

Owns: that connection (its limits, a new one where it broke), the lock on it, the regular beats that
keep both, and the refusal of a pooler, behind which a lock is nobody's. PostgreSQL frees the lock
with the connection, whatever ends it. Covered: a holder that is killed, frozen (in a transaction
too) or cut off, with its machine or without; a database that goes away and comes back. Does not
own: what a lock means (`presence.py`, `leader.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from datetime import datetime
from typing import Protocol

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from feedback.db import Database, DatabaseUnfit, show_url

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5
KEEPALIVE = {"keepalives_idle": 3, "keepalives_interval": 1, "keepalives_count": 3}
"""In seconds and probes: else a read waits for hours on a server whose machine is gone."""

_TAKE = text("SELECT pg_try_advisory_lock(:namespace, :key)")
_STILL = text("SELECT pg_backend_pid() = :process")
_PROCESS = text("SELECT pg_backend_pid()")
_SET = text(
    "SELECT set_config(name, :milliseconds, false) FROM pg_settings WHERE name = :name"
)  # what this PostgreSQL does not know stays unset
_PLACE = text("SELECT current_database(), pg_postmaster_start_time(), pg_is_in_recovery()")


class KeptLock:
    """A lock that is held as long as its connection lives. All calls block, one at a time.

    `name` has the `namespace` and `key` of the lock, signed 32-bit numbers: single 64-bit keys, as
    others here take, are apart from pairs. PostgreSQL ends the connection after `idle_seconds`
    without a statement: of a machine without power no packet tells it that the holder is dead.
    `answer_seconds` is for a statement, and for the server's machine to confirm a packet.
    """

    def __init__(
        self, url: URL, name: Mapping[str, int], *, idle_seconds: float, answer_seconds: float
    ) -> None:
        self.holds = False
        self._name = dict(name)
        self._limits = {
            "idle_session_timeout": idle_seconds,  # from PostgreSQL 14 on
            "idle_in_transaction_session_timeout": idle_seconds,
            "statement_timeout": answer_seconds,
        }
        self._engine = _create_engine(url, answer_seconds)
        self._connection: Connection | None = None
        self._process: int | None = None  #: of PostgreSQL, behind the connection

    @property
    def connection(self) -> Connection:
        """The one that holds the lock, or has tried to."""
        assert self._connection is not None
        return self._connection

    def take(self) -> bool:
        """Take the lock unless somebody holds it already; whether it was taken just now.

        One statement, and a few more where the connection is new, because the old one broke.
        """
        before = self._connection
        if before is not None and (before.invalidated or before.in_transaction()):
            self.close()  # used again it would connect by itself, or go on in what broke off
        had, is_new = self.holds, self._connection is None
        try:
            self.holds = self._ask()
        except DBAPIError:
            self.close()
            if is_new:
                raise
            return self.take()
        return self.holds and not had

    def _ask(self) -> bool:
        """Whether the lock is held now: it is as long as its connection answers."""
        connection = self._connection or self._connect()
        with connection.begin():
            if self.holds:
                return connection.scalar(_STILL, {"process": self._process}) is True
            return connection.scalar(_TAKE, self._name) is True

    def _connect(self) -> Connection:
        self._connection = self._engine.connect()
        try:
            with self._connection.begin():
                for name, seconds in self._limits.items():
                    limit = {"name": name, "milliseconds": str(int(seconds * 1000))}
                    self._connection.execute(_SET, limit)
                self._process = self._connection.scalar(_PROCESS)
        except BaseException:
            self.close()  # none is used without its limits
            raise
        return self._connection

    def close(self) -> None:
        """Give the lock back."""
        self.holds = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()  # without a rollback, which fails where PostgreSQL ended it
            connection.close()


def _create_engine(url: URL, answer_seconds: float = CONNECT_SECONDS) -> Engine:
    return create_engine(
        url,
        poolclass=NullPool,
        pool_reset_on_return=None,  # a connection that is given back is closed
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "tcp_user_timeout": int(answer_seconds * 1000),
            **KEEPALIVE,
        },
    )


def check_direct(database: Database, engine: Engine | None = None) -> None:
    """Raise DatabaseUnfit where `database.direct_url` is no place for locks.

    A pooler may give server processes to transactions, not to sessions: a lock that is taken there
    belongs to whoever has that process next, and outlives its session. And what is locked in
    another database than the tables are in keeps nobody from them.
    """
    if database.is_sqlite:
        return
    engine = engine or _create_engine(database.direct_url)
    try:
        keeps_processes = _keeps_processes(engine)
        place = _find_place(engine)
    except DBAPIError as error:
        where = show_url(database.direct_url.render_as_string(hide_password=False))
        said = str(error.orig).strip().splitlines()[0]
        raise DatabaseUnfit(
            f"PostgreSQL can't be used at {where}: {said}; see database.direct_url"
        ) from None
    if not keeps_processes:
        raise DatabaseUnfit(
            "two sessions of the database met the same server process: a pooler gives connections "
            "to transactions there, and locks and notifications need sessions; set "
            "database.direct_url to PostgreSQL itself"
        )
    name, _, is_standby = place
    if place != _find_place(database.engine) or is_standby:
        found = f"a standby of {name!r}" if is_standby else f"another database ({name!r})"
        raise DatabaseUnfit(
            f"database.direct_url leads to {found}, database.url elsewhere; both must reach the "
            "same database, database.direct_url without a pooler"
        )


def _keeps_processes(engine: Engine) -> bool:
    """Whether each of two sessions keeps its own server process, whatever the other one does."""
    with ExitStack() as stack:
        first, second = sessions = [
            stack.enter_context(engine.connect()).execution_options(isolation_level="AUTOCOMMIT")
            for _ in range(2)
        ]
        seen = []
        for busy in sessions:  # its transaction keeps a pooler from giving the process away
            busy.exec_driver_sql("BEGIN")
            seen.append((first.scalar(_PROCESS), second.scalar(_PROCESS)))
            busy.exec_driver_sql("COMMIT")
    return seen[0] == seen[1] and seen[0][0] != seen[0][1]


def _find_place(engine: Engine) -> tuple[str, datetime, bool]:
    """Which database it is, of which server by its start, and whether it only follows another."""
    with engine.connect() as connection:
        name, started, is_standby = connection.execute(_PLACE).one()
    return name, started, is_standby


class Keeper(Protocol):
    """What `beating` keeps going; both calls block."""

    def beat(self) -> None: ...
    def close(self) -> None: ...


@asynccontextmanager
async def beating(
    keeper: Keeper, seconds: float, failure: str, *, action: str
) -> AsyncIterator[None]:
    """Have `keeper` beat before the block, and every so many `seconds` until it ends; then close.

    It has a thread of its own: requests that fill the others hold up no beat. A beat that fails is
    tried again at the next, and what fails time and again is logged once, as `failure`.
    """
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    async def try_beat(*, was_away: bool = False) -> bool:
        try:
            await loop.run_in_executor(thread, keeper.beat)
        except Exception:
            if not was_away:
                logger.exception(failure, extra={"action": action})
            return True
        return False

    async def beat_until_stopped(is_away: bool) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), seconds)
            if stopping.is_set():
                return
            is_away = await try_beat(was_away=is_away)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=action) as thread:
        beats = asyncio.create_task(beat_until_stopped(await try_beat()))
        try:
            yield
        finally:
            stopping.set()  # not cancelled: the thread of a beat would go on beside `close`
            await beats
            await loop.run_in_executor(thread, keeper.close)
