"""The audit log: who did what, in order, each entry's hash covering the one before.

Owns: the rows of `audit`. Entries are appended and never changed; `verify` names the first one that
was. Where the process has a `Seal`, an entry's hash is made with a key that the database doesn't
have, and the newest entry is published to a file: whoever writes into the database alone can
neither give an altered entry a hash that fits nor cut the end off unseen. Does not own: what is
worth an entry, where the key comes from. Details name things by identifier and never hold what
people wrote.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import event, select, text
from sqlalchemy.orm import Session

from feedback.audit_head import publish_head, read_head
from feedback.db import Database, canonical_json, now
from feedback.tables import AuditEntry

GENESIS_HASH = "0" * 64
"""Stands before the first entry."""

MAX_DETAILS_CHARS = 8_000
_LOCK = 0x6175646974  # "audit": one appender at a time on PostgreSQL
_PAGE = 1_000


logger = logging.getLogger(__name__)

_SEAL = "audit_seal"  #: in a session's `info`


@dataclass(frozen=True, slots=True)
class Seal:
    """What entries are signed with, and where the newest one is published."""

    keys: Mapping[str, bytes] = field(repr=False)  #: by their public names; the first one signs
    head: Path | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """A log in which no entry was altered."""

    entries: int
    signed_from: int | None  #: the first entry that was signed; None: none was


def seal(database: Database, with_: Seal) -> None:
    """Sign and verify with this in all sessions of a database."""
    database.info[_SEAL] = with_


class AuditBroken(Exception):
    """An entry of the log is not what was appended, or is missing.

    `seq` is the number of the first such entry.
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
    """Add an entry at the end of the chain, visible with the transaction that it describes.

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
    found: Seal | None = session.info.get(_SEAL)
    name, key = next(iter(found.keys.items())) if found is not None else (None, None)
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
        signed_by=name,
    )
    entry.hash = build_hash(entry, key)
    session.add(entry)
    session.flush()
    if found is not None and found.head is not None:
        _publish_later(session, found.head, entry)
    return entry


def _publish_later(session: Session, path: Path, entry: AuditEntry) -> None:
    """Publish the entry after its commit, where the log still holds what was published before.

    Otherwise the file stays as it is, and with it the proof that something was taken out. The end
    of a savepoint is no commit, and an entry that was rolled back with one is not published.
    """
    seq, entry_hash, before = entry.seq, entry.hash, read_head(path)
    if before is not None and before != (seq - 1, entry.previous_hash):
        there = session.scalar(select(AuditEntry.hash).where(AuditEntry.seq == before[0]))
        if there != before[1] or before[0] >= seq:
            logger.error(
                "The audit log is not the one that was published: run `burnish audit verify`",
                extra={"action": "audit_altered", "entry": before[0]},
            )
            return

    waits = True

    @event.listens_for(session, "after_commit")  # which comes at the end of a savepoint too
    def publish(_session: Session) -> None:
        nonlocal waits
        if not waits or session.in_nested_transaction():
            return
        waits = False
        if entry not in session:  # rolled back
            return
        try:
            publish_head(path, seq, entry_hash)
        except OSError:
            logger.exception("Audit entry not published", extra={"action": "audit_unpublished"})


def newest_name(session: Session) -> str | None:
    """The name of the key that signed the newest entry; None where the newest isn't signed."""
    return session.scalar(select(AuditEntry.signed_by).order_by(AuditEntry.seq.desc()).limit(1))


def head(session: Session) -> tuple[int, str]:
    """Number and hash of the newest entry; (0, GENESIS_HASH) where there is none."""
    newest = select(AuditEntry.seq, AuditEntry.hash).order_by(AuditEntry.seq.desc()).limit(1)
    row = session.execute(newest).first()
    return (0, GENESIS_HASH) if row is None else (row.seq, row.hash)


def build_hash(entry: AuditEntry, key: bytes | None = None) -> str:
    """Over the previous hash and everything that the entry says; 64 hex digits.

    sha256, or with a key the HMAC of it (RFC 2104).
    """
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
    covered = f"{entry.previous_hash}\n{said}".encode()
    if key is None:
        return hashlib.sha256(covered).hexdigest()
    return hmac.new(key, covered, hashlib.sha256).hexdigest()


def verify(session: Session) -> Verified:
    """Read the whole log; AuditBroken with the first entry that is not what was appended.

    An entry that is altered together with its hash is named itself where it was signed, and
    otherwise the one before that which no longer fits.
    """
    found: Seal = session.info.get(_SEAL) or Seal({})
    published = None if found.head is None else read_head(found.head)
    seq, expected, signed_from = 0, GENESIS_HASH, None
    for entry in _in_order(session):
        seq += 1
        if entry.seq != seq:
            raise AuditBroken(
                seq, f"entry {seq} of the audit log is missing, {entry.seq} was found in its place"
            )
        if signed_from is None and entry.signed_by is not None:
            signed_from = seq
        _check_hash(entry, _key_of(entry, found, signed_from))
        if (
            entry.previous_hash != expected
        ):  # whole in itself, so the one before was exchanged together with its hash
            altered = max(seq - 1, 1)
            raise AuditBroken(
                altered, f"entry {altered} of the audit log was altered, its hash with it"
            )
        if published is not None and published[0] == seq and published[1] != entry.hash:
            raise AuditBroken(
                seq,
                f"entry {seq} of the audit log is not the one that {found.head} names: it, or one "
                "before it, was altered, its hash with it",
            )
        expected = entry.hash
    if published is not None and published[0] > seq:
        raise AuditBroken(
            seq + 1,
            f"entry {seq + 1} of the audit log is missing: the log ends with {seq}, and "
            f"{found.head} names {published[0]} (after a restored backup: put that file back too)",
        )
    if seq and found.keys and signed_from is None:
        raise AuditBroken(
            seq, f"entry {seq} of the audit log is not signed, and neither is any before it"
        )
    return Verified(seq, signed_from)


def _key_of(entry: AuditEntry, found: Seal, signed_from: int | None) -> bytes | None:
    """The key that an entry was signed with; None for those from before there was one."""
    if entry.signed_by is None:
        if signed_from is not None:
            raise AuditBroken(
                entry.seq,
                f"entry {entry.seq} of the audit log is not signed, and entry {signed_from} is: it "
                "was altered, or something else than Burnish wrote it",
            )
        return None
    if entry.signed_by not in found.keys:
        raise AuditBroken(
            entry.seq,
            f"entry {entry.seq} of the audit log is signed with the secret {entry.signed_by!r}, "
            f"which is not here ({', '.join(map(repr, found.keys)) or 'none'} is): it was altered, "
            "or the secret is on another machine",
        )
    return found.keys[entry.signed_by]


def _check_hash(entry: AuditEntry, key: bytes | None) -> None:
    if not hmac.compare_digest(entry.hash, build_hash(entry, key)):
        raise AuditBroken(
            entry.seq,
            f"entry {entry.seq} of the audit log ({entry.action} {entry.subject}) was altered",
        )


def list_entries(
    session: Session,
    *,
    subject: str | None = None,
    action: str | None = None,
    after: int | None = None,
    limit: int = 50,
) -> tuple[list[AuditEntry], bool]:
    """List entries, newest first, and say whether there are more.

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
