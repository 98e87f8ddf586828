"""`/admin/releases`: versions that can answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from server.access.keyring import Caller
from server.access.scopes import Scope
from server.access.visibility import append_audit, get_release, reach
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, ReadSession, WriteSession
from server.endpoints.fields import Limit, Note, Page, one_of, page, unix
from tuner import releases
from tuner.tables import Decision, Deployment, Evaluation, Release, ReleaseState

router = APIRouter(prefix="/admin/releases", tags=["releases"], route_class=JsonRoute)


class Discard(Body):
    reason: Note | None = None


class ReleaseEvaluation(TypedDict):
    """The newest evaluation of a release that has decided."""

    id: str
    decision: Annotated[str, one_of(Decision)] | None
    reasons: list[str]
    checks: list[dict[str, Any]]
    baseline: str


class ReleaseObject(TypedDict):
    """A version that can answer."""

    id: str
    name: str
    object: Literal["release"]
    deployment: str
    state: Annotated[str, one_of(ReleaseState)]
    state_reason: str | None
    role: releases.Role | None
    adapter: str | None
    base_model: str
    base_revision: str
    system_prompt: str | None
    sampling: dict[str, Any]
    acceptance: dict[str, Any] | None
    job_id: str | None
    suffix: str | None
    dataset_id: str | None
    sources_left_out: list[str]
    evaluation: ReleaseEvaluation | None
    created_by: str | None
    created_at: int


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
    return page([_release(session, caller, row) for row in rows], has_more)


@router.get("/{name}")
def get_one_release(name: str, caller: CallerDep, session: ReadSession) -> ReleaseObject:
    """One release, its role now, and its newest evaluation."""
    return _release(session, caller, get_release(session, caller, name))


@router.post("/{name}/discard")
def discard_release(
    name: str, caller: CallerDep, session: WriteSession, body: Discard | None = None
) -> ReleaseObject:
    """Put a release away for good."""
    reason = body.reason if body is not None else None
    row = releases.discard(session, get_release(session, caller, name).name, reason=reason)
    append_audit(session, caller, "release_discarded", row.name, reason=reason)
    return _release(session, caller, row)


def _release(session: Session, caller: Caller, row: Release) -> ReleaseObject:
    deployment = session.get_one(Deployment, row.deployment)
    return {
        "id": row.name,
        "name": row.name,
        "object": "release",
        "deployment": row.deployment,
        "state": row.state,
        "state_reason": row.state_reason,
        "role": releases.role_of(deployment, row.number),
        "adapter": row.adapter_id,
        "base_model": row.base_model,
        "base_revision": row.base_revision,
        "system_prompt": row.system_prompt if caller.key.allows(Scope.CURATE) else None,
        "sampling": row.sampling,
        "acceptance": row.acceptance,
        "job_id": row.job_id,
        "suffix": row.suffix,
        "dataset_id": row.dataset_id,
        "sources_left_out": row.sources_left_out,
        "evaluation": _evaluation(releases.newest_evaluation(session, row.name)),
        "created_by": row.created_by,
        "created_at": unix(row.created_at),
    }


def _evaluation(row: Evaluation | None) -> ReleaseEvaluation | None:
    if row is None:
        return None
    return {
        "id": row.id,
        "decision": row.decision,
        "reasons": row.reasons,
        "checks": row.checks,
        "baseline": row.baseline,
    }
