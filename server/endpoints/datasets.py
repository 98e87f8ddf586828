"""`/admin/datasets`: judged answers, frozen."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from sqlalchemy.orm import Session

from feedback import datasets
from server.access.keyring import Caller
from server.access.visibility import (
    append_audit,
    check_job_quota,
    get_dataset,
    get_deployment,
    reach,
)
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession
from server.endpoints.fields import Limit, Name, WaitSeconds
from server.endpoints.waiting import PENDING, wait_while_pending
from server.gateway import Gateway
from server.views.datasets import DatasetObject, view_dataset
from server.views.objects import Page, page
from tuner.policies import curation_policy
from tuner.tuning import create_freeze_job

router = APIRouter(prefix="/admin/datasets", tags=["data sets"], route_class=JsonRoute)


class DatasetCreate(Body):
    deployment: Name
    policy: dict[str, Any] | None = Field(
        default=None, description="Choices of curation that differ from the deployment's."
    )
    wait_seconds: WaitSeconds = 60


@router.post(
    "",
    status_code=201,
    responses={202: {"model": DatasetObject, "description": "Still queued or running."}},
)
async def create_dataset(
    body: DatasetCreate,
    request: Request,
    response: Response,
    caller: CallerDep,
    gateway: GatewayDep,
) -> DatasetObject:
    """Freeze what was judged so far; `failed` carries its reason."""
    dataset_id = await asyncio.to_thread(_create, gateway, caller, body)

    def look(session: Session) -> DatasetObject:
        return view_dataset(session, datasets.get_dataset(session, dataset_id))

    found = await wait_while_pending(request, gateway, look, seconds=body.wait_seconds)
    response.status_code = 202 if found["status"] in PENDING else 201
    return found


@router.get("")
def list_datasets(
    caller: CallerDep,
    session: ReadSession,
    deployment: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> Page[DatasetObject]:
    """Data sets, newest first."""
    if after is not None:
        get_dataset(session, caller, after, param="after")
    rows, has_more = datasets.list_datasets(
        session, deployments=reach(session, caller, deployment), after=after, limit=limit
    )
    return page([view_dataset(session, row) for row in rows], has_more)


@router.get("/{dataset_id}")
def get_one_dataset(dataset_id: str, caller: CallerDep, session: ReadSession) -> DatasetObject:
    """One data set: counts, what was dropped and why, its files."""
    return view_dataset(session, get_dataset(session, caller, dataset_id))


def _create(gateway: Gateway, caller: Caller, body: DatasetCreate) -> str:
    with gateway.database.write() as session:
        deployment = get_deployment(session, caller, body.deployment, param="deployment")
        policy = curation_policy(deployment, body.policy)
        check_job_quota(session, caller, gateway.settings)
        user = caller.key.user
        dataset = datasets.create_dataset(session, deployment.name, policy, created_by=user)
        job = create_freeze_job(
            session, dataset, person_id=caller.person_id, created_by=caller.key.user
        )
        append_audit(
            session,
            caller,
            "dataset_requested",
            dataset.id,
            deployment=deployment.name,
            job=job.id,
            policy_hash=policy.hash,
        )
        return dataset.id
