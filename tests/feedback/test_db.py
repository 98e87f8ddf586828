"""The database: what is stored comes back as it was, and transactions are what they say."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import select, text

from feedback.db import BUSY_MILLISECONDS, Database, Writing, canonical_json, new_id
from feedback.tables import AuditEntry, Person
from tests.feedback.record import make_viewer


def test_a_written_block_is_kept_and_a_raising_one_is_not(database: Database) -> None:
    with database.write() as session:
        make_viewer(session, "ana")

    def write_and_fail() -> None:
        with database.write() as session:
            make_viewer(session, "ben")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    with database.read() as session:
        assert session.scalars(select(Person.user)).all() == ["ana"]


def test_a_read_sees_one_snapshot_whatever_is_committed_meanwhile(database: Database) -> None:
    with database.read() as session:
        before = session.scalars(select(Person.user)).all()
        with database.write() as other:
            make_viewer(other, "ana")
        assert session.scalars(select(Person.user)).all() == before == []


def test_times_come_back_aware_in_utc_and_json_in_canonical_form(database: Database) -> None:
    there = datetime(2026, 3, 1, 12, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    entry = {"at": there, "actor": "a", "action": "b", "subject": "c"}
    with database.write() as session:
        details = {"b": "ä", "a": [1, 1.5, None]}
        session.add(AuditEntry(seq=1, previous_hash="", hash="", details=details, **entry))
    with database.read() as session:
        found = session.scalars(select(AuditEntry)).one()
        stored = session.execute(text("SELECT details FROM audit")).scalar_one()
    assert (found.at, found.at.tzinfo) == (there, UTC)
    assert stored == '{"a":[1,1.5,null],"b":"ä"}'


def test_a_time_without_a_zone_is_refused(sqlite_database: Database) -> None:
    naive = datetime(2026, 1, 1)  # noqa: DTZ001 - that it has no zone is what is tested
    with pytest.raises(Exception, match="without a zone"), sqlite_database.write() as session:
        session.add(Person(id="p", user="u", created_at=naive))


def test_not_a_number_is_no_canonical_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})


def test_identifiers_sort_by_time_and_do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr("feedback.db.time.time_ns", lambda: next(clock))
    ids = [new_id("fb_") for _ in range(500)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {len("fb_") + 26}


def test_sqlite_is_durable_and_forgets_what_is_deleted(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        found = [
            session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        ]
    assert found == ["wal", 2, 1, 1]


INSERTION = 'INSERT INTO people (id, "user", end_user, created_at) VALUES (?, ?, ?, ?)'
ROW = ("person_1", "anna", "", "2026-01-01 00:00:00")


@pytest.fixture
def writing(database: Database) -> Iterator[Writing]:
    writing = Writing(database)
    yield writing
    writing.close()


def write(writing: Writing, *statements: str, row: tuple[str, ...] = ROW) -> None:
    with writing.transaction(durable=True) as driver:
        for statement in statements:
            driver.run(statement, [row])


def test_a_commit_waits_for_the_disk_where_it_was_asked_to(
    database: Database, writing: Writing
) -> None:
    asked = "PRAGMA synchronous" if database.is_sqlite else "SHOW synchronous_commit"
    found = []
    for durable in (True, False, True, False):
        with writing.transaction(durable=durable) as driver:
            found += [setting for (setting,) in driver.rows(asked, ())]
    # PostgreSQL may crash while an answer is under way, and its gateway would not notice.
    assert found == ([2, 1, 2, 1] if database.is_sqlite else ["on"] * 4)
    writing.close()
    if database.is_sqlite:  # nobody gets the connection that waits for nothing
        with database.write() as session:
            assert session.scalar(text(asked)) == 2


def test_a_transaction_that_fails_leaves_nothing_and_the_next_one_goes_on(
    database: Database, writing: Writing
) -> None:
    for broken in ("INSERT INTO nowhere VALUES (?, ?, ?, ?)", INSERTION):
        with pytest.raises(database.engine.dialect.loaded_dbapi.Error):
            write(writing, INSERTION, broken)
    with database.read() as session:
        assert session.scalars(select(Person.id)).all() == []
    write(writing, INSERTION)
    with database.read() as session:
        assert session.scalars(select(Person.id)).all() == ["person_1"]


def test_an_error_of_the_driver_does_not_repeat_what_was_to_be_written(
    database: Database, writing: Writing
) -> None:
    statement = "INSERT INTO answer_texts (answer_id, messages) VALUES (?, ?)"
    with pytest.raises(database.engine.dialect.loaded_dbapi.IntegrityError) as refused:
        write(writing, statement, row=("nobody", "what somebody said"))
    assert "DETAIL" not in str(refused.value)
    assert "said" not in str(refused.value)


def test_a_connection_that_has_ended_is_replaced(postgres_database: Database) -> None:
    writing = Writing(postgres_database)
    with writing.transaction(durable=True) as driver:
        [(number,)] = driver.rows("SELECT pg_backend_pid()", ())
    with postgres_database.write() as session:
        session.execute(text("SELECT pg_terminate_backend(:number)"), {"number": number})
    with pytest.raises(postgres_database.engine.dialect.loaded_dbapi.OperationalError):
        write(writing, INSERTION)
    write(writing, INSERTION)
    writing.close()
    with postgres_database.read() as session:
        assert session.scalars(select(Person.id)).all() == ["person_1"]


def test_a_checkpoint_that_fails_leaves_the_connection_as_patient_as_before(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Failing:
        def cursor(self) -> Failing:
            return self

        def execute(self, statement: str) -> None:
            said.append(statement)
            if "checkpoint" in statement:
                raise sqlite_database.engine.dialect.loaded_dbapi.OperationalError("locked")

        def close(self) -> None:
            said.append("closed")

    monkeypatch.setattr(sqlite_database.engine, "raw_connection", Failing)
    assert sqlite_database.truncate_log() is False
    assert said[-2:] == [f"PRAGMA busy_timeout={BUSY_MILLISECONDS}", "closed"]
