"""`/admin/keys`: who may call, and with which scopes.

A change is in force on this gateway before its reply is sent, on others with their next refresh.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field, StrictInt

from server.access import administrators
from server.access.keyring import Caller
from server.endpoints.bodies import Body, JsonRoute, Part
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession
from server.endpoints.fields import Limit, Name
from server.gateway import Gateway
from server.views.keys import KeyObject, NewKey, view_key
from server.views.objects import Page, page

router = APIRouter(prefix="/admin/keys", tags=["administration"], route_class=JsonRoute)

Most = Annotated[StrictInt, Field(ge=1, le=1_000_000_000)]
GivenScope = Literal["chat", "feedback", "rate", "curate", "tune", "promote", "admin"]


class KeyLimits(Part):
    """Limits of this key alone; what is left out is as in the settings, null is no limit."""

    requests_per_minute: Most | None = None
    tokens_per_minute: Most | None = None
    concurrent_requests: Most | None = None


class KeyCreate(Body):
    """A key and what it may do."""

    user: Name = Field(description="The person, or the application, that the key speaks for.")
    scopes: Annotated[list[GivenScope], Field(min_length=1)]
    deployments: list[str] | None = Field(default=None, description="null: all of them.")
    end_users: bool = Field(default=False, description="The key speaks for many people.")
    header_only: bool = Field(
        default=False,
        description="With end_users: a header alone says which; what bodies say is not believed.",
    )
    limits: KeyLimits | None = None
    name: Name | None = None


@router.post("", status_code=201)
async def create(body: KeyCreate, caller: CallerDep, gateway: GatewayDep) -> NewKey:
    """Make a key. The reply alone shows it."""
    made = await asyncio.to_thread(_create, gateway, caller, body)
    await gateway.directory.refresh()
    return made


@router.get("")
def list_keys(
    caller: CallerDep, session: ReadSession, after: str | None = None, limit: Limit = 20
) -> Page[KeyObject]:
    """Keys in force, newest first."""
    rows, has_more = administrators.list_keys(session, caller, after=after, limit=limit)
    return page([view_key(row) for row in rows], has_more)


@router.delete("/{key_id}")
async def revoke(key_id: str, caller: CallerDep, gateway: GatewayDep) -> KeyObject:
    """Put a key out of force."""
    revoked = await asyncio.to_thread(_revoke, gateway, caller, key_id)
    await gateway.directory.refresh()
    return revoked


def _create(gateway: Gateway, caller: Caller, body: KeyCreate) -> NewKey:
    with gateway.database.write() as session:
        row, token = administrators.create_key(
            session,
            caller,
            user=body.user,
            scopes=body.scopes,
            deployments=body.deployments,
            end_users=body.end_users,
            header_only=body.header_only,
            limits=None if body.limits is None else body.limits.model_dump(exclude_unset=True),
            name=body.name,
        )
        return {**view_key(row), "key": token}


def _revoke(gateway: Gateway, caller: Caller, key_id: str) -> KeyObject:
    with gateway.database.write() as session:
        return view_key(administrators.revoke_key(session, caller, key_id))
