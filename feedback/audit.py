"""The audit log: who did what, in order, each entry's hash covering the one before.

Owns: the rows of `audit`. Entries are appended and never changed; `verify` names the first one that
was. What hashes alone cannot show is the removal of the newest entries: keep `head` somewhere else
to see that too. Does not own: what is worth an entry. Details name things by identifier and never
hold what people wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from feedback.db import canonical_json, now
from feedback.tables import AuditEntry

GENESIS_HASH = "0" * 64
"""Stands before the first entry."""

MAX_DETAILS_CHARS = 8_000
_LOCK = 0x6175646974  # "audit": one appender at a time on PostgreSQL
_PAGE = 1_000


class AuditBroken(Exception):
    """An entry is not what was appended;

    `seq` names the first such entry, or the first that is missing.
    """

    def __init__(self, seq: int, message: str) -> None:
        super().__init__(message)
        self.seq = seq


def append(
    session: Session,
    *,
    actor: str,
    action: str,
    subject: str,
    key_id: str | None = None,
    made_by: Sequence[Mapping[str, str | None]] = (),
    details: Mapping[str, Any] | None = None,
) -> AuditEntry:
    """Add an entry at the end of the chain; it becomes visible with the transaction that it
    describes.

    Call it late in the transaction: on PostgreSQL other appenders wait until this one ends.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    facts = dict(details or {})
    if len(canonical_json(facts)) > MAX_DETAILS_CHARS:
        raise ValueError(
            f"details of {action!r} on {subject!r} take more than {MAX_DETAILS_CHARS} characters"
        )
    seq, previous_hash = head(session)
    entry = AuditEntry(
        seq=seq + 1,
        at=now(),
        actor=actor,
        key_id=key_id,
        made_by=[dict(maker) for maker in made_by] or None,
        action=action,
        subject=subject,
        details=facts,
        previous_hash=previous_hash,
    )
    entry.hash = build_hash(entry)
    session.add(entry)
    session.flush()
    return entry


def head(session: Session) -> tuple[int, str]:
    """Number and hash of the newest entry; (0, GENESIS_HASH) where there is none."""
    newest = select(AuditEntry.seq, AuditEntry.hash).order_by(AuditEntry.seq.desc()).limit(1)
    row = session.execute(newest).first()
    return (0, GENESIS_HASH) if row is None else (row.seq, row.hash)


def build_hash(entry: AuditEntry) -> str:
    """sha256 over the previous hash and everything that the entry says; 64 hex digits."""
    facts = {
        "seq": entry.seq,
        "at": entry.at.isoformat(timespec="microseconds"),
        "actor": entry.actor,
        "key_id": entry.key_id,
        "action": entry.action,
        "subject": entry.subject,
        "details": entry.details,
    }
    if entry.made_by is not None:  # entries of earlier versions have none
        facts["made_by"] = entry.made_by
    said = canonical_json(facts)
    return hashlib.sha256(f"{entry.previous_hash}\n{said}".encode()).hexdigest()


def verify(session: Session) -> int:
    """The number of entries, when each is what was appended;

    AuditBroken with the first that is not.
    """
    seq, expected = 0, GENESIS_HASH
    for entry in _in_order(session):
        seq += 1
        if entry.seq != seq:
            raise AuditBroken(
                seq, f"entry {seq} of the audit log is missing, {entry.seq} was found in its place"
            )
        if entry.hash != build_hash(entry):
            raise AuditBroken(
                seq, f"entry {seq} of the audit log ({entry.action} {entry.subject}) was altered"
            )
        if (
            entry.previous_hash != expected
        ):  # whole in itself, so the one before was exchanged together with its hash
            altered = max(seq - 1, 1)
            raise AuditBroken(
                altered, f"entry {altered} of the audit log was altered, its hash with it"
            )
        expected = entry.hash
    return seq


def list_entries(
    session: Session,
    *,
    subject: str | None = None,
    action: str | None = None,
    after: int | None = None,
    limit: int = 50,
) -> tuple[list[AuditEntry], bool]:
    """Entries, newest first, and whether there are more;

    `after` is the number of the last one seen.
    """
    statement = select(AuditEntry)
    if subject is not None:
        statement = statement.where(AuditEntry.subject == subject)
    if action is not None:
        statement = statement.where(AuditEntry.action == action)
    if after is not None:
        statement = statement.where(AuditEntry.seq < after)
    rows = list(session.scalars(statement.order_by(AuditEntry.seq.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def _in_order(session: Session) -> Iterator[AuditEntry]:
    """All entries as the database has them now, a page at a time."""
    seq: int | None = None
    while True:
        statement = select(AuditEntry).order_by(AuditEntry.seq).limit(_PAGE)
        if seq is not None:
            statement = statement.where(AuditEntry.seq > seq)
        page = list(session.scalars(statement, execution_options={"populate_existing": True}))
        yield from page
        if len(page) < _PAGE:
            return
        seq = page[-1].seq
