"""The audit log: a chain that names the first entry that was touched."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from feedback import audit
from feedback.audit import AuditBroken
from feedback.db import Database


def fill(database: Database, entries: int = 5) -> None:
    for number in range(entries):
        with database.write() as session:
            audit.append(
                session, actor="ana", action="promote", subject=f"a@{number}", details={"n": number}
            )


def test_an_untouched_log_is_verified_whole(database: Database) -> None:
    fill(database)
    with database.read() as session:
        assert audit.verify(session) == 5
        assert audit.head(session)[0] == 5


def test_an_empty_log_is_whole(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        assert audit.verify(session) == 0
        assert audit.head(session) == (0, audit.GENESIS_HASH)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE audit SET actor = 'eve' WHERE seq = 3", 3),
        ("UPDATE audit SET details = '{\"n\": 7}' WHERE seq = 1", 1),
        ("UPDATE audit SET at = '2020-01-01 00:00:00' WHERE seq = 5", 5),
        ("DELETE FROM audit WHERE seq = 2", 2),
        ("UPDATE audit SET seq = 9 WHERE seq = 5", 5),
    ],
)
def test_the_first_altered_entry_is_named(database: Database, statement: str, named: int) -> None:
    fill(database)
    with database.write() as session:
        session.execute(text(statement))
    with database.read() as session, pytest.raises(AuditBroken) as broken:
        audit.verify(session)
    assert broken.value.seq == named


def test_an_entry_rewritten_with_a_fitting_hash_is_named(database: Database) -> None:
    fill(database)
    with database.write() as session:
        entry = audit.list_entries(session, subject="a@2")[0][0]
        entry.actor = "eve"
        entry.hash = audit.build_hash(entry)
    with database.read() as session, pytest.raises(AuditBroken) as broken:
        audit.verify(session)
    assert broken.value.seq == 3


def test_entries_of_a_transaction_that_fails_leave_no_gap(database: Database) -> None:
    fill(database, 1)

    def append_and_fail() -> None:
        with database.write() as session:
            audit.append(session, actor="a", action="b", subject="c")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        append_and_fail()
    fill(database, 1)
    with database.read() as session:
        assert audit.verify(session) == 2


def test_appenders_at_once_make_one_chain(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fill(database, 4), range(4)))
    with database.read() as session:
        assert audit.verify(session) == 16


def test_pages_run_from_the_newest_to_the_first(sqlite_database: Database) -> None:
    fill(sqlite_database)
    with sqlite_database.read() as session:
        first, more = audit.list_entries(session, limit=3)
        rest, no_more = audit.list_entries(session, after=first[-1].seq, limit=3)
        assert [entry.seq for entry in first + rest] == [5, 4, 3, 2, 1]
        assert (more, no_more) == (True, False)
        assert audit.list_entries(session, action="rollback") == ([], False)


def test_details_that_would_hold_a_text_are_refused(sqlite_database: Database) -> None:
    details = {"prompt": "x" * audit.MAX_DETAILS_CHARS}
    with sqlite_database.write() as session, pytest.raises(ValueError, match="more than"):
        audit.append(session, actor="a", action="b", subject="c", details=details)
