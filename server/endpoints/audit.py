"""`/admin/audit`: who did what."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from feedback.audit import AuditBroken, list_entries, verify
from server.access.visibility import check_unlimited
from server.endpoints.dependencies import CallerDep, ReadSession
from server.endpoints.fields import Limit
from server.views.audit import AuditObject, AuditVerification, view_entry, view_verification
from server.views.objects import Page, page

router = APIRouter(tags=["administration"])


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
    return page([view_entry(row) for row in rows], has_more)


@router.get("/admin/audit/verify")
def verify_audit(caller: CallerDep, session: ReadSession) -> AuditVerification:
    """Read the whole log, and name the first entry that is not what was written."""
    check_unlimited(caller, "the audit log")
    try:
        return view_verification(verify(session))
    except AuditBroken as broken:
        return view_verification(broken)
