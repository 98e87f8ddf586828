"""`/admin/jobs`: work in the background, of every kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from typing_extensions import TypedDict

from server.access.visibility import get_job, reach
from server.endpoints.dependencies import CallerDep, ReadSession
from server.endpoints.fields import Limit, Page, one_of, page, unix
from tuner.jobs import list_jobs
from tuner.methods import Method
from tuner.tables import Job, JobKind, JobStatus

router = APIRouter(prefix="/admin/jobs", tags=["jobs"])


class JobError(TypedDict):
    code: str | None
    message: str


class JobObject(TypedDict):
    """Work in the background."""

    id: str
    object: Literal["job"]
    kind: Annotated[str, one_of(JobKind)]
    status: Annotated[str, one_of(JobStatus)]
    method: Annotated[str, one_of(Method)] | None
    deployment: str | None
    spec: dict[str, Any]
    result: dict[str, Any]
    error: JobError | None
    attempt: int
    cancel_requested: bool
    created_by: str | None
    created_at: int
    started_at: int | None
    finished_at: int | None


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
    return page([_job(row) for row in rows], has_more)


@router.get("/{job_id}")
def get_one_job(job_id: str, caller: CallerDep, session: ReadSession) -> JobObject:
    """One job with what came of it."""
    return _job(get_job(session, caller, job_id))


def _job(row: Job) -> JobObject:
    message = row.error_message
    return {
        "id": row.id,
        "object": "job",
        "kind": row.kind,
        "status": row.status,
        "method": row.method,
        "deployment": row.deployment,
        "spec": row.spec,
        "result": row.result,
        "error": None if message is None else {"code": row.error_code, "message": message},
        "attempt": row.attempt,
        "cancel_requested": row.cancel_requested,
        "created_by": row.created_by,
        "created_at": unix(row.created_at),
        "started_at": unix(row.started_at),
        "finished_at": unix(row.finished_at),
    }
