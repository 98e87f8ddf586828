"""Evaluations: whole, and as a release shows the one that decided last."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from server.views.objects import one_of, unix
from tuner.tables import Decision, Evaluation, Job, JobStatus

Status = Literal["queued", "running", "finished", "failed"]

_STATUS_OF_JOB: dict[JobStatus, Status] = {
    JobStatus.QUEUED: "queued",
    JobStatus.PAUSED: "queued",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "finished",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "failed",
}


class EvaluationObject(TypedDict):
    """A comparison of a release with a baseline."""

    id: str
    object: Literal["evaluation"]
    deployment: str
    release: str
    baseline: str
    status: Status
    decision: Annotated[str, one_of(Decision)] | None
    reasons: list[str]
    checks: list[dict[str, Any]]
    metrics: dict[str, Any]
    error: str | None
    dataset_id: str | None
    job_id: str | None
    created_by: str | None
    created_at: int
    finished_at: int | None


class ReleaseEvaluation(TypedDict):
    """The newest evaluation of a release that has decided."""

    id: str
    decision: Annotated[str, one_of(Decision)] | None
    reasons: list[str]
    checks: list[dict[str, Any]]
    baseline: str


def view_evaluation(session: Session, row: Evaluation) -> EvaluationObject:
    """An evaluation; it stands where its job stands."""
    job = session.get(Job, row.job_id) if row.job_id is not None else None
    if job is not None:
        status = _STATUS_OF_JOB[JobStatus(job.status)]
    else:
        status = "failed" if row.error is not None else "finished"
    return {
        "id": row.id,
        "object": "evaluation",
        "deployment": row.deployment,
        "release": row.release,
        "baseline": row.baseline,
        "status": status,
        "decision": row.decision,
        "reasons": row.reasons,
        "checks": row.checks,
        "metrics": row.metrics,
        "error": row.error,
        "dataset_id": row.dataset_id,
        "job_id": row.job_id,
        "created_by": row.created_by,
        "created_at": unix(row.created_at),
        "finished_at": unix(row.finished_at),
    }


def view_decision(row: Evaluation) -> ReleaseEvaluation:
    """What an evaluation decided, and why."""
    return {
        "id": row.id,
        "decision": row.decision,
        "reasons": row.reasons,
        "checks": row.checks,
        "baseline": row.baseline,
    }
