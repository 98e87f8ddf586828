"""`/admin/audit`: who did what."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from typing_extensions import TypedDict

from feedback.audit import AuditBroken, list_entries, verify
from feedback.tables import AuditEntry
from server.access.visibility import check_unlimited
from server.endpoints.dependencies import CallerDep, ReadSession
from server.endpoints.fields import Limit, Page, page

router = APIRouter(tags=["administration"])


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


@router.get("/admin/audit")
def list_audit(
    caller: CallerDep,
    session: ReadSession,
    subject: str | None = None,
    action: str | None = None,
    after: Annotated[int, Query(ge=0, lt=2**31)] | None = None,
    limit: Limit = 50,
) -> Page[AuditObject]:
    """Entries, newest first."""
    check_unlimited(caller, "the audit log")
    rows, has_more = list_entries(session, subject=subject, action=action, after=after, limit=limit)
    return page([_entry(row) for row in rows], has_more)


@router.get("/admin/audit/verify")
def verify_audit(caller: CallerDep, session: ReadSession) -> AuditVerification:
    """Read the whole log, and name the first entry that is not what was written."""
    check_unlimited(caller, "the audit log")
    try:
        found = verify(session)
    except AuditBroken as broken:
        return _verification(None, None, broken.seq, str(broken))
    return _verification(found.entries, found.signed_from, None, None)


def _verification(
    entries: int | None, signed_from: int | None, altered: int | None, message: str | None
) -> AuditVerification:
    return {
        "object": "audit.verification",
        "whole": altered is None,
        "entries": entries,
        "signed_from": signed_from,
        "altered": altered,
        "message": message,
    }


def _entry(row: AuditEntry) -> AuditObject:
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
