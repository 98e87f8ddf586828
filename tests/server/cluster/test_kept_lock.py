"""A lock on a connection of its own, and what must not stand between it and PostgreSQL."""

from __future__ import annotations

from contextlib import closing

import pytest
from sqlalchemy import StaticPool, create_engine

from feedback.db import Database, DatabaseUnfit
from server.cluster.kept_lock import KeptLock, check_direct
from tests.postgres_sessions import shorten, until

NAME = {"namespace": 1, "key": 2}


def keep(database: Database) -> KeptLock:
    return KeptLock(database.direct_url, NAME, idle_seconds=30, answer_seconds=10)


def test_a_lock_has_one_holder(postgres_database: Database) -> None:
    with closing(keep(postgres_database)) as one, closing(keep(postgres_database)) as other:
        assert one.take()
        assert not one.take()  # it has it
        assert not other.take()
        assert (one.holds, other.holds) == (True, False)
        one.close()
        until(other.take)


def test_a_holder_that_freezes_in_a_transaction_loses_the_lock(
    postgres_database: Database,
) -> None:
    with closing(keep(postgres_database)) as frozen, closing(keep(postgres_database)) as one:
        frozen.take()
        shorten("idle_in_transaction_session_timeout", frozen.connection, 30)  # and no commit
        until(one.take)
        one.close()
        until(frozen.take)  # on a new connection


def test_a_pooler_that_gives_processes_to_transactions_is_refused(
    postgres_database: Database, sqlite_database: Database
) -> None:
    check_direct(sqlite_database)
    check_direct(postgres_database)
    shared = create_engine(postgres_database.url, poolclass=StaticPool)
    with pytest.raises(DatabaseUnfit, match=r"set database\.direct_url to PostgreSQL itself"):
        check_direct(postgres_database, shared)
    shared.dispose()


def test_another_database_than_that_of_the_tables_is_no_place_for_locks(
    postgres_database: Database,
) -> None:
    elsewhere = postgres_database.direct_url.set(database="template1")
    split = Database(
        postgres_database.url.render_as_string(hide_password=False),
        direct_url=elsewhere.render_as_string(hide_password=False),
    )
    with pytest.raises(DatabaseUnfit, match=r"leads to another database \('template1'\)"):
        check_direct(split)
    split.dispose()


def test_an_address_that_nobody_listens_at_is_told_with_its_setting() -> None:
    nowhere = Database("postgresql://pooler/x", direct_url="postgresql://u:secret@127.0.0.1:1/x")
    with pytest.raises(
        DatabaseUnfit, match=r"u:\*\*\*@127.0.0.1:1/x: .*; see database\.direct_url"
    ):
        check_direct(nowhere)


def test_locks_are_taken_past_the_pooler() -> None:
    database = Database("postgresql://pooler/x", direct_url="postgresql://server/x")
    assert database.direct_url.host == "server"
    assert database.direct_url.drivername == database.url.drivername
