"""`/admin/releases`: versions that can answer."""

from __future__ import annotations

from fastapi import APIRouter

from server.access.visibility import append_audit, get_release, reach
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, ReadSession, WriteSession
from server.endpoints.fields import Limit, Note
from server.views.objects import Page, page
from server.views.releases import ReleaseObject, view_release
from tuner import releases

router = APIRouter(prefix="/admin/releases", tags=["releases"], route_class=JsonRoute)


class Discard(Body):
    reason: Note | None = None


@router.get("")
def list_releases(
    caller: CallerDep,
    session: ReadSession,
    deployment: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> Page[ReleaseObject]:
    """Releases by deployment, newest first in each."""
    if after is not None:
        get_release(session, caller, after, param="after")
    rows, has_more = releases.list_releases(
        session, deployments=reach(session, caller, deployment), after=after, limit=limit
    )
    return page([view_release(session, caller, row) for row in rows], has_more)


@router.get("/{name}")
def get_one_release(name: str, caller: CallerDep, session: ReadSession) -> ReleaseObject:
    """One release, its role now, and its newest evaluation."""
    return view_release(session, caller, get_release(session, caller, name))


@router.post("/{name}/discard")
def discard_release(
    name: str, caller: CallerDep, session: WriteSession, body: Discard | None = None
) -> ReleaseObject:
    """Put a release away for good."""
    reason = body.reason if body is not None else None
    row = releases.discard(session, get_release(session, caller, name).name, reason=reason)
    append_audit(session, caller, "release_discarded", row.name, reason=reason)
    return view_release(session, caller, row)
