"""`/admin/whoami`: what the gateway takes a key for."""

from __future__ import annotations

from fastapi import APIRouter

from server.endpoints.dependencies import CallerDep
from server.views.keys import WhoAmI, view_whoami

router = APIRouter(tags=["administration"])


@router.get("/admin/whoami")
async def whoami(caller: CallerDep) -> WhoAmI:
    """The key of this request."""
    return view_whoami(caller.key)
