"""Keys: to administrators without their text, and to a caller what their own stands for."""

from __future__ import annotations

from typing import Annotated, Literal

from typing_extensions import TypedDict

from server.access.keyring import KeyView
from server.access.scopes import Scope
from server.tables import Key
from server.views.objects import one_of, unix


class KeyObject(TypedDict):
    """A key without its text, which is kept nowhere."""

    id: str
    object: Literal["key"]
    user: str
    name: str | None
    scopes: list[Annotated[str, one_of(Scope)]]
    deployments: list[str] | None
    end_users: bool
    header_only: bool
    limits: dict[str, int | None]
    created_by: str | None
    created_by_key: str | None
    created_at: int
    revoked_at: int | None


class NewKey(KeyObject):
    """A key that was just made. This reply alone shows its text: null when it is repeated."""

    key: str | None


class WhoAmI(TypedDict):
    """What a key stands for."""

    user: str
    scopes: list[Annotated[str, one_of(Scope)]]
    deployments: tuple[str, ...] | None
    end_users: bool
    header_only: bool
    key_id: str


def view_key(row: Key) -> KeyObject:
    """A key without its text."""
    return {
        "id": row.id,
        "object": "key",
        "user": row.user,
        "name": row.name,
        "scopes": row.scopes,
        "deployments": row.deployments,
        "end_users": row.end_users,
        "header_only": row.header_only,
        "limits": row.limits or {},
        "created_by": row.created_by,
        "created_by_key": row.created_by_key,
        "created_at": unix(row.created_at),
        "revoked_at": unix(row.revoked_at),
    }


def view_whoami(key: KeyView) -> WhoAmI:
    """What the gateway takes a key for."""
    return {
        "user": key.user,
        "scopes": sorted(key.scopes),
        "deployments": key.deployments,
        "end_users": key.end_users,
        "header_only": key.header_only,
        "key_id": key.id,
    }
