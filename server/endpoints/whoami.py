"""`/admin/whoami`: what the gateway takes a key for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.sessions import CallerDep

router = APIRouter(tags=["administration"])


@router.get("/admin/whoami")
async def whoami(caller: CallerDep) -> dict[str, Any]:
    """The key of this request."""
    key = caller.key
    return {
        "user": key.user,
        "scopes": sorted(key.scopes),
        "deployments": key.deployments,
        "end_users": key.end_users,
        "key_id": key.id,
    }
