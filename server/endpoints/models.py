"""`/v1/models`: what a caller may name as `model`."""

from __future__ import annotations

from fastapi import APIRouter

from server.chat.directory import load_release
from server.chat.routing import Snapshot, check_model, list_names, unknown_model
from server.endpoints.dependencies import CallerDep, GatewayDep
from server.views.models import ModelList, ModelObject, view_model, view_models
from tuner.tables import ReleaseState

router = APIRouter(tags=["models"])


def _names(snapshot: Snapshot, allowed: tuple[str, ...] | None) -> list[str]:
    names = list_names(snapshot, allowed)
    return sorted(
        {*names, *(alias for alias, target in snapshot.aliases.items() if target in names)}
    )


@router.get("/v1/models")
async def list_models(caller: CallerDep, gateway: GatewayDep) -> ModelList:
    """Deployments, their aliases, and the base."""
    return view_models(_names(gateway.directory.snapshot, caller.key.deployments))


@router.get("/v1/models/{model:path}")
def get_model(model: str, caller: CallerDep, gateway: GatewayDep) -> ModelObject:
    """One of them, or a release by its name."""
    snapshot, allowed = gateway.directory.snapshot, caller.key.deployments
    check_model(snapshot, model, allowed)
    if "@" not in model:
        return view_model(model)
    if len(model) <= 128 and "\x00" not in model:
        with gateway.database.read() as session:
            release = load_release(session, model)
        alive = release is not None and release.state not in (
            ReleaseState.DISCARDED,
            ReleaseState.FAILED,
        )
        if release is not None and alive:
            return view_model(model, parent=release.deployment)
    raise unknown_model(model, snapshot, allowed)
