"""`/admin/evaluations`: candidates compared with what is in production."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from server.access.keyring import Caller
from server.access.visibility import (
    append_audit,
    check_job_quota,
    get_evaluation,
    get_release,
    reach,
)
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession
from server.endpoints.fields import Limit, Name, WaitSeconds
from server.endpoints.waiting import PENDING, wait_while_pending
from server.gateway import Gateway
from server.views.evaluations import EvaluationObject, view_evaluation
from server.views.objects import Page, page
from tuner.evaluation import evaluations

router = APIRouter(prefix="/admin/evaluations", tags=["evaluations"], route_class=JsonRoute)


class EvaluationCreate(Body):
    release: Name
    baseline: Name | None = None
    wait_seconds: WaitSeconds = 0


@router.post(
    "",
    status_code=201,
    responses={202: {"model": EvaluationObject, "description": "Still queued or running."}},
)
async def create_evaluation(
    body: EvaluationCreate,
    request: Request,
    response: Response,
    caller: CallerDep,
    gateway: GatewayDep,
) -> EvaluationObject:
    """Compare a release with a baseline; by default with production."""
    evaluation_id = await asyncio.to_thread(_create, gateway, caller, body)

    def look(session: Session) -> EvaluationObject:
        return view_evaluation(session, evaluations.get_evaluation(session, evaluation_id))

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
) -> Page[EvaluationObject]:
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
    return page([view_evaluation(session, row) for row in rows], has_more)


@router.get("/{evaluation_id}")
def get_one_evaluation(
    evaluation_id: str, caller: CallerDep, session: ReadSession
) -> EvaluationObject:
    """One evaluation: the decision, its reasons, its checks with figures."""
    return view_evaluation(session, get_evaluation(session, caller, evaluation_id))


def _create(gateway: Gateway, caller: Caller, body: EvaluationCreate) -> str:
    with gateway.database.write() as session:
        release = get_release(session, caller, body.release, param="release")
        baseline = body.baseline and get_release(session, caller, body.baseline, param="baseline")
        check_job_quota(session, caller, gateway.settings)
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
