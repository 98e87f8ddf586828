"""`/admin/whoami`: what the gateway takes a key for."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from typing_extensions import TypedDict

from server.access.scopes import Scope
from server.endpoints.dependencies import CallerDep
from server.endpoints.fields import one_of

router = APIRouter(tags=["administration"])


class WhoAmI(TypedDict):
    """What a key stands for."""

    user: str
    scopes: list[Annotated[str, one_of(Scope)]]
    deployments: tuple[str, ...] | None
    end_users: bool
    header_only: bool
    key_id: str


@router.get("/admin/whoami")
async def whoami(caller: CallerDep) -> WhoAmI:
    """The key of this request."""
    key = caller.key
    return {
        "user": key.user,
        "scopes": sorted(key.scopes),
        "deployments": key.deployments,
        "end_users": key.end_users,
        "header_only": key.header_only,
        "key_id": key.id,
    }
