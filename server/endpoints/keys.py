"""`/admin/keys`: who may call, and with which scopes.

A change is in force on this gateway before its reply is sent, on others with their next refresh.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field, StrictInt
from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.errors import Conflict, Forbidden, NotFound
from server.access.keyring import Caller
from server.access.keys import create_key, revoke_key
from server.access.scopes import Scope
from server.access.visibility import append_audit, get_deployment
from server.endpoints.bodies import Body, JsonRoute, Part
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession
from server.endpoints.fields import Limit, Name
from server.gateway import Gateway
from server.tables import Key
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
    rows = [row for row in _in_force(session) if _sees(caller, row)]
    if after is not None:
        rows = [row for row in rows if row.id < after]
    return page([view_key(row) for row in rows[:limit]], len(rows) > limit)


@router.delete("/{key_id}")
async def revoke(key_id: str, caller: CallerDep, gateway: GatewayDep) -> KeyObject:
    """Put a key out of force."""
    revoked = await asyncio.to_thread(_revoke, gateway, caller, key_id)
    await gateway.directory.refresh()
    return revoked


def _create(gateway: Gateway, caller: Caller, body: KeyCreate) -> NewKey:
    allowed = caller.key.deployments
    if body.deployments is None and allowed is not None:
        raise Forbidden(
            f"this key is limited to {', '.join(allowed) or 'no deployment'} and cannot make one "
            "that is not; name some of these in 'deployments'"
        )
    with gateway.database.write() as session:
        for name in body.deployments or ():
            get_deployment(session, caller, name, param="deployments")
        _check_user(session, caller, body.user)
        row, token = create_key(
            session,
            user=body.user,
            scopes=body.scopes,
            deployments=body.deployments,
            end_users=body.end_users,
            header_only=body.header_only,
            limits=None if body.limits is None else body.limits.model_dump(exclude_unset=True),
            name=body.name,
            created_by=caller.key.user,
            created_by_key=caller.key.id,
        )
        append_audit(
            session,
            caller,
            "key_created",
            row.id,
            user=row.user,
            scopes=row.scopes,
            deployments=row.deployments,
            end_users=row.end_users,
            header_only=row.header_only,
            limits=row.limits,
        )
        return {**view_key(row), "key": token}


def _check_user(session: Session, caller: Caller, user: str) -> None:
    """Refuse a user who has or had a key that a limited administrator may not see.

    A second key would speak as the same person, whose uploads belong to no deployment. Raises
    Forbidden.
    """
    known = session.scalars(select(Key).where(Key.user == user))
    if not all(_sees(caller, row) for row in known):
        raise Forbidden(
            f"{user!r} has keys beyond {', '.join(caller.key.deployments or ())}, to which this "
            "key is limited; choose another 'user', or ask an administrator of all deployments"
        )


def _revoke(gateway: Gateway, caller: Caller, key_id: str) -> KeyObject:
    with gateway.database.write() as session:
        keys = _in_force(session, hold=True)
        row = next((key for key in keys if key.id == key_id and _sees(caller, key)), None)
        if row is None:
            raise NotFound(f"no key {key_id!r} is in force")
        if [key for key in keys if _rules_all(key)] == [row]:
            raise Conflict(
                f"{key_id!r} is the last admin key; make another before you revoke it",
                code="last_admin_key",
            )
        row = revoke_key(session, row.id)
        append_audit(session, caller, "key_revoked", row.id, user=row.user)
        return view_key(row)


def _in_force(session: Session, *, hold: bool = False) -> list[Key]:
    """All keys but the workers', newest first; `hold` keeps others from revoking meanwhile."""
    query = select(Key).where(Key.revoked_at.is_(None)).order_by(Key.id.desc())
    rows = session.scalars(query.with_for_update() if hold else query)
    return [row for row in rows if Scope.INTERNAL not in row.scopes]


def _sees(caller: Caller, row: Key) -> bool:
    """A limited administrator handles keys within the same limits."""
    allowed = caller.key.deployments
    return allowed is None or (row.deployments is not None and {*row.deployments} <= {*allowed})


def _rules_all(row: Key) -> bool:
    return Scope.ADMIN in row.scopes and row.deployments is None
