"""Jobs of every kind: work in the background."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from typing_extensions import TypedDict

from server.views.objects import one_of, unix
from tuner.methods import Method
from tuner.tables import Job, JobKind, JobStatus


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


def view_job(row: Job) -> JobObject:
    """One job with what came of it."""
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
