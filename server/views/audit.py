"""Entries of the audit log, and what reading the whole log has found."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from feedback.audit import AuditBroken, Verified
from feedback.tables import AuditEntry


class AuditObject(TypedDict):
    """One entry; its hash covers the one before."""

    id: int
    object: Literal["audit.entry"]
    at: str
    actor: str
    key_id: str | None
    made_by: list[dict[str, str | None]]  # who made that key, and the key of that one, and so on
    action: str
    subject: str
    details: dict[str, Any]
    previous_hash: str
    signed_by: str | None  # the name of the secret that the hash was made with
    hash: str


class AuditVerification(TypedDict):
    """What reading the whole log has found."""

    object: Literal["audit.verification"]
    whole: bool
    entries: int | None
    signed_from: int | None  # entries before it are of versions that did not sign
    altered: int | None  # the first entry that was altered, added or taken out
    message: str | None


def view_entry(row: AuditEntry) -> AuditObject:
    """One entry as it was hashed."""
    return {
        "id": row.seq,
        "object": "audit.entry",
        "at": row.at.isoformat(timespec="microseconds"),  # as it is hashed
        "actor": row.actor,
        "key_id": row.key_id,
        "made_by": row.made_by or [],
        "action": row.action,
        "subject": row.subject,
        "details": row.details,
        "previous_hash": row.previous_hash,
        "signed_by": row.signed_by,
        "hash": row.hash,
    }


def view_verification(found: Verified | AuditBroken) -> AuditVerification:
    """That the log is whole, or the first entry that is not what was written."""
    if isinstance(found, AuditBroken):
        return {
            "object": "audit.verification",
            "whole": False,
            "entries": None,
            "signed_from": None,
            "altered": found.seq,
            "message": str(found),
        }
    return {
        "object": "audit.verification",
        "whole": True,
        "entries": found.entries,
        "signed_from": found.signed_from,
        "altered": None,
        "message": None,
    }
