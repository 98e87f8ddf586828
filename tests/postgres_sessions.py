"""Sessions of PostgreSQL as tests end them and wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from feedback.db import Database
from server.cluster.kept_lock import KeptLock


def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds: PostgreSQL tells nobody when a connection has ended."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # there is no event to wait for


def shorten(limit: str, session: Connection | Session, seconds: int) -> None:
    """Have PostgreSQL end a session after a millisecond of silence, instead of after `seconds`."""
    assert session.scalar(text(f"SHOW {limit}")) == f"{seconds}s"
    session.execute(text(f"SET {limit} = 1"))


def end_session_of(lock: KeptLock, database: Database) -> None:
    """End the lock's connection, as a network or a server that restarts does."""
    process = {"pid": lock.connection.scalar(text("SELECT pg_backend_pid()"))}
    lock.connection.rollback()
    with database.write() as session:
        session.execute(text("SELECT pg_terminate_backend(:pid)"), process)
    there = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")

    def is_gone() -> bool:
        with database.read() as session:
            return session.scalar(there, process) == 0

    until(is_gone)
