"""Releases: versions that can answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from server.access.keyring import Caller
from server.access.scopes import Scope
from server.views.evaluations import ReleaseEvaluation, view_decision
from server.views.objects import one_of, unix
from tuner import releases
from tuner.tables import Deployment, Release, ReleaseState


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


def view_release(session: Session, caller: Caller, row: Release) -> ReleaseObject:
    """A release, its role now, and its newest evaluation; its prompt is for curators."""
    evaluation = releases.newest_evaluation(session, row.name)
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
        "evaluation": None if evaluation is None else view_decision(evaluation),
        "created_by": row.created_by,
        "created_at": unix(row.created_at),
    }
