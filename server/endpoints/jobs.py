"""`/admin/jobs`: work in the background, of every kind."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.access import get_job, reach
from server.endpoints.fields import Limit, unix
from server.endpoints.stored import page
from server.sessions import CallerDep, ReadSession
from tuner.jobs import list_jobs
from tuner.tables import Job, JobKind, JobStatus

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
) -> dict[str, Any]:
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
    return page([_job(row) for row in rows], has_more)


@router.get("/{job_id}")
def get_one_job(job_id: str, caller: CallerDep, session: ReadSession) -> dict[str, Any]:
    """One job with what came of it."""
    return _job(get_job(session, caller, job_id))


def _job(row: Job) -> dict[str, Any]:
    error = {"code": row.error_code, "message": row.error_message}
    return {
        "id": row.id,
        "object": "job",
        "kind": row.kind,
        "status": row.status,
        "method": row.method,
        "deployment": row.deployment,
        "spec": row.spec,
        "result": row.result,
        "error": error if row.error_message is not None else None,
        "attempt": row.attempt,
        "cancel_requested": row.cancel_requested,
        "created_by": row.created_by,
        "created_at": unix(row.created_at),
        "started_at": unix(row.started_at),
        "finished_at": unix(row.finished_at),
    }
