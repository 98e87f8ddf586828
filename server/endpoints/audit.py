"""`/admin/audit`: who did what."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from typing_extensions import TypedDict

from feedback.audit import list_entries
from feedback.tables import AuditEntry
from server.access import check_unlimited
from server.endpoints.fields import Limit, Page, page
from server.sessions import CallerDep, ReadSession

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
    hash: str


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
        "hash": row.hash,
    }
