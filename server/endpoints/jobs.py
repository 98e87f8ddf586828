"""`/admin/jobs`: work in the background, of every kind."""

from __future__ import annotations

from fastapi import APIRouter

from server.access.visibility import get_job, reach
from server.endpoints.dependencies import CallerDep, ReadSession
from server.endpoints.fields import Limit
from server.views.jobs import JobObject, view_job
from server.views.objects import Page, page
from tuner.jobs import list_jobs
from tuner.tables import JobKind, JobStatus

router = APIRouter(prefix="/admin/jobs", tags=["jobs"])


@router.get("")
def list_all_jobs(
    caller: CallerDep,
    session: ReadSession,
    kind: JobKind | None = None,
    status: JobStatus | None = None,
    deployment: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> Page[JobObject]:
    """Jobs, newest first."""
    if after is not None:
        get_job(session, caller, after)
    rows, has_more = list_jobs(
        session,
        kind=kind,
        deployments=reach(session, caller, deployment),
        status=status,
        after=after,
        limit=limit,
    )
    return page([view_job(row) for row in rows], has_more)


@router.get("/{job_id}")
def get_one_job(job_id: str, caller: CallerDep, session: ReadSession) -> JobObject:
    """One job with what came of it."""
    return view_job(get_job(session, caller, job_id))
