"""The audit log: a chain that names the first entry that was touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from feedback import audit
from feedback.audit import AuditBroken, Seal, Verified
from feedback.audit_head import publish_head, read_head
from feedback.db import Database
from feedback.tables import AuditEntry


def fill(database: Database, entries: int = 5) -> None:
    for number in range(entries):
        with database.write() as session:
            audit.append(
                session, actor="ana", action="promote", subject=f"a@{number}", details={"n": number}
            )


def test_an_untouched_log_is_verified_whole(database: Database) -> None:
    fill(database)
    with database.read() as session:
        assert audit.verify(session) == Verified(5, None)
        assert audit.head(session)[0] == 5


def test_an_empty_log_is_whole(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        assert audit.verify(session) == Verified(0, None)
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
        assert audit.verify(session).entries == 2


def test_appenders_at_once_make_one_chain(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fill(database, 4), range(4)))
    with database.read() as session:
        assert audit.verify(session).entries == 16


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


# Signed


@pytest.fixture
def sealed(database: Database, tmp_path: Path) -> Database:
    """A database with two entries of an earlier version and five that are signed."""
    fill(database, 2)
    audit.seal(database, Seal({"new": b"n" * 32}, tmp_path / "audit.head"))
    fill(database, 5)
    return database


def rehash(session: Session, first: int, key: bytes | None, **changes: str) -> None:
    """Alter an entry, and give it and all after it hashes that fit, as far as `key` goes."""
    rows = session.query(AuditEntry).filter(AuditEntry.seq >= first).order_by(AuditEntry.seq).all()
    before = audit.list_entries(session, after=first, limit=1)[0]
    expected = before[0].hash if before else audit.GENESIS_HASH
    for name, value in changes.items():
        setattr(rows[0], name, value)
    for row in rows:
        row.previous_hash = expected
        row.signed_by = row.signed_by if key is not None else None
        row.hash = expected = audit.build_hash(row, key)


def changed(statement: str) -> Callable[[Session], object]:
    return lambda session: session.execute(text(statement))


def test_a_log_says_from_where_on_it_is_signed(sealed: Database, tmp_path: Path) -> None:
    with sealed.read() as session:
        assert audit.verify(session) == Verified(7, 3)
        assert read_head(tmp_path / "audit.head") == audit.head(session)
        assert audit.newest_name(session) == "new"


@pytest.mark.parametrize(
    ("tamper", "named"),
    [
        # Rewritten with hashes that fit, signed with another key, with none, or wholly unsigned.
        (lambda session: rehash(session, 4, b"guessed", actor="eve"), 4),
        (lambda session: rehash(session, 4, None, actor="eve"), 4),
        (lambda session: rehash(session, 1, None, actor="eve"), 7),
        (lambda session: session.execute(text("UPDATE audit SET made_by = '[]' WHERE seq = 5")), 5),
        (
            lambda session: session.execute(text("UPDATE audit SET signed_by = 'x' WHERE seq = 5")),
            5,
        ),
        # An entry of before the key, with a hash that fits: the next one that is signed tells.
        (
            lambda session: session.execute(
                text("UPDATE audit SET hash = :hash, previous_hash = hash WHERE seq = 2"),
                {"hash": hashlib.sha256(b"").hexdigest()},
            ),
            2,
        ),
        # The end cut off, and cut off and written on.
        (changed("DELETE FROM audit WHERE seq > 5"), 6),
        (changed("DELETE FROM audit"), 1),
    ],
)
def test_rewriting_rehashing_and_cutting_off_are_found(
    sealed: Database, tamper: Callable[[Session], object], named: int
) -> None:
    with sealed.write() as session:
        tamper(session)
    with sealed.read() as session, pytest.raises(AuditBroken) as broken:
        audit.verify(session)
    assert broken.value.seq == named


def test_a_log_that_was_cut_and_written_on_does_not_take_the_proof_along(
    sealed: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = read_head(tmp_path / "audit.head")
    with sealed.write() as session:
        session.execute(text("DELETE FROM audit WHERE seq > 5"))
    fill(sealed, 4)
    assert "run `burnish audit verify`" in caplog.text
    assert read_head(tmp_path / "audit.head") == head
    with (
        sealed.read() as session,
        pytest.raises(AuditBroken, match=r"entry 7 .*audit\.head") as found,
    ):
        audit.verify(session)
    assert found.value.seq == 7


def test_an_older_secret_goes_on_verifying_and_a_lost_one_is_named(
    sealed: Database, tmp_path: Path
) -> None:
    keys = {"newer": b"m" * 32, "new": b"n" * 32}
    audit.seal(sealed, Seal(keys, tmp_path / "audit.head"))
    fill(sealed, 1)
    with sealed.read() as session:
        assert audit.verify(session) == Verified(8, 3)
    audit.seal(sealed, Seal({"newer": keys["newer"]}, tmp_path / "audit.head"))
    with sealed.read() as session, pytest.raises(AuditBroken, match=r"entry 3 .* secret 'new'"):
        audit.verify(session)


def test_an_entry_whose_transaction_fails_is_not_published(
    sealed: Database, tmp_path: Path
) -> None:
    head = read_head(tmp_path / "audit.head")

    def append_and_fail() -> None:
        with sealed.write() as session:
            audit.append(session, actor="a", action="b", subject="c")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        append_and_fail()
    assert read_head(tmp_path / "audit.head") == head


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_rolled_back_after_a_savepoint_is_not_published(
    sealed: Database, tmp_path: Path, whole: bool
) -> None:
    """The transaction after its savepoint ended, or the savepoint with the entry alone."""
    head = read_head(tmp_path / "audit.head")
    with sealed.write() as session:
        with session.begin_nested() as savepoint:
            audit.append(session, actor="a", action="b", subject="c")
            if not whole:
                savepoint.rollback()
        if whole:
            session.rollback()
    assert read_head(tmp_path / "audit.head") == head
    with sealed.write() as session:
        audit.append(session, actor="a", action="b", subject="c")
        with session.begin_nested():
            session.execute(text("SELECT 1"))
    with sealed.read() as session:
        assert audit.verify(session) == Verified(8, 3)
        assert read_head(tmp_path / "audit.head") == audit.head(session)


def test_the_published_entry_never_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "audit.head"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seq: publish_head(path, seq, f"{seq:064}"), range(1, 100)))
    assert read_head(path) == (99, f"{99:064}")
    path.write_bytes(b"")
    assert read_head(path) is None
