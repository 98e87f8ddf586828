"""Deployments: their roles, their settings, and what their engines hold."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from server.access.keyring import Caller
from server.access.scopes import Scope
from server.engines.picture import Picture
from server.views.objects import unix
from tuner import deployments, releases
from tuner.tables import Deployment, Release


class EngineObject(TypedDict):
    """An engine, and the releases of the deployment that it can answer as."""

    id: str
    state: str
    reason: str | None
    adapter_slots: int  # that it has, where it says so and that is fewer than the settings'
    releases: list[str]


class DeploymentObject(TypedDict):
    """A public model name: its roles and what it is set to."""

    id: str
    name: str
    object: Literal["deployment"]
    base_model: str
    production: str
    previous: str | None
    canary: str | None
    canary_percent: float
    generation: int
    rolled_back: bool
    aliases: list[str]
    system_prompt: str | None
    sampling: dict[str, Any]
    policies: dict[str, Any]
    sources: list[str]
    engines: list[EngineObject]
    created_at: int


class ChangedDeployment(DeploymentObject):
    """A deployment after a change, and the release that its new prompt or sampling made."""

    candidate: str | None


def view_deployment(
    session: Session, caller: Caller, row: Deployment, picture: Picture
) -> DeploymentObject:
    """A deployment as it is now; its system prompt is for curators."""
    production = releases.production_of(session, row)

    def name_of(number: int | None) -> str | None:
        return None if number is None else f"{row.name}@{number}"

    return {
        "name": row.name,
        "id": row.name,
        "object": "deployment",
        "base_model": row.base_model,
        "production": production.name,
        "previous": name_of(row.previous),
        "canary": name_of(row.canary),
        "canary_percent": row.canary_percent,
        "generation": row.generation,
        "rolled_back": row.rolled_back,
        "aliases": deployments.list_aliases(session, row.name),
        "system_prompt": production.system_prompt if caller.key.allows(Scope.CURATE) else None,
        "sampling": production.sampling,
        "policies": row.policies,
        "sources": row.sources,
        "engines": _engines(session, row, picture),
        "created_at": unix(row.created_at),
    }


def _engines(session: Session, row: Deployment, picture: Picture) -> list[EngineObject]:
    """Each engine with the releases of this deployment that it can serve.

    They are those with a role, and all others whose adapter is loaded there.
    """
    roles = {number for number in (row.production, row.previous, row.canary) if number is not None}
    engines = picture.engines.values()
    proven = {name for engine in engines for name in engine.proven()}
    found = session.scalars(
        select(Release)
        .where(
            Release.deployment == row.name,
            Release.number.in_(roles) | Release.engine_name.in_(proven),
        )
        .order_by(Release.number)
    ).all()
    return [
        {
            "id": engine.id,
            "state": engine.status,
            "reason": engine.reason or None,
            "adapter_slots": engine.slots,
            "releases": [
                release.name
                for release in found
                if (engine.is_ready and release.adapter_id is None)
                or release.engine_name in engine.proven()
            ],
        }
        for engine in engines
    ]
