"""`/admin/evaluations`: candidates compared with what is in production."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from server.access import append_audit, get_evaluation, get_release, reach
from server.auth import Caller
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.datasets import WaitSeconds
from server.endpoints.fields import Limit, Name, unix
from server.endpoints.stored import page
from server.endpoints.waiting import PENDING, wait_while_pending
from server.gateway import Gateway
from server.sessions import CallerDep, GatewayDep, ReadSession
from tuner import evaluations
from tuner.tables import Evaluation, Job, JobStatus

router = APIRouter(prefix="/admin/evaluations", tags=["evaluations"], route_class=JsonRoute)

_STATUS_OF_JOB = {
    JobStatus.QUEUED: "queued",
    JobStatus.PAUSED: "queued",
    JobStatus.RUNNING: "running",
    JobStatus.SUCCEEDED: "finished",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "failed",
}


class EvaluationCreate(Body):
    release: Name
    baseline: Name | None = None
    wait_seconds: WaitSeconds = 0


@router.post("", status_code=201, responses={202: {"description": "Still queued or running."}})
async def create_evaluation(
    body: EvaluationCreate,
    request: Request,
    response: Response,
    caller: CallerDep,
    gateway: GatewayDep,
) -> dict[str, Any]:
    """Compare a release with a baseline; by default with production."""
    evaluation_id = await asyncio.to_thread(_create, gateway, caller, body)

    def look(session: Session) -> dict[str, Any]:
        return _evaluation(session, evaluations.get_evaluation(session, evaluation_id))

    found = await wait_while_pending(request, gateway, look, seconds=body.wait_seconds)
    response.status_code = 202 if found["status"] in PENDING else 201
    return found


@router.get("")
def list_evaluations(
    caller: CallerDep,
    session: ReadSession,
    deployment: str | None = None,
    release: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Evaluations, newest first."""
    if after is not None:
        get_evaluation(session, caller, after)
    if release is not None:
        get_release(session, caller, release, param="release")
    rows, has_more = evaluations.list_evaluations(
        session,
        deployments=reach(session, caller, deployment),
        release=release,
        after=after,
        limit=limit,
    )
    return page([_evaluation(session, row) for row in rows], has_more)


@router.get("/{evaluation_id}")
def get_one_evaluation(
    evaluation_id: str, caller: CallerDep, session: ReadSession
) -> dict[str, Any]:
    """One evaluation: the decision, its reasons, its checks with figures."""
    return _evaluation(session, get_evaluation(session, caller, evaluation_id))


def _create(gateway: Gateway, caller: Caller, body: EvaluationCreate) -> str:
    with gateway.database.write() as session:
        release = get_release(session, caller, body.release, param="release")
        baseline = body.baseline and get_release(session, caller, body.baseline, param="baseline")
        row, job = evaluations.create_evaluation(
            session,
            release,
            baseline or None,
            person_id=caller.person_id,
            created_by=caller.key.user,
        )
        append_audit(
            session,
            caller,
            "evaluation_requested",
            row.id,
            release=row.release,
            baseline=row.baseline,
            job=job.id,
        )
        return row.id


def _evaluation(session: Session, row: Evaluation) -> dict[str, Any]:
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
