"""Keys as rows: made and revoked.

Owns: what a new key is, and who made whom. Does not own: how a request's key is recognised
(`keyring.py`), what scopes mean (`scopes.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

from sqlalchemy.orm import Session

from feedback.db import new_id, now
from feedback.errors import BadRequest, NotFound
from server.access.keyring import hash_key
from server.access.scopes import Scope
from server.tables import Key

KEY_PREFIX = "sk-burnish-"


_MOST_MAKERS = 16  #: of a chain of keys, in one audit entry


def create_key(
    session: Session,
    *,
    user: str,
    scopes: Iterable[str],
    deployments: Iterable[str] | None = None,
    end_users: bool = False,
    header_only: bool = False,
    limits: Mapping[str, int | None] | None = None,
    name: str | None = None,
    created_by: str | None = None,
    created_by_key: str | None = None,
    token: str | None = None,
) -> tuple[Key, str]:
    """Make a key; the second value is the key itself, which is kept nowhere.

    `token` fixes it (a first key given by whoever installs). Raises BadRequest for an unknown
    scope.
    """
    wanted = sorted(set(scopes))
    for scope in wanted:
        if scope not in set(Scope):
            known = ", ".join(s for s in Scope if s is not Scope.INTERNAL)
            raise BadRequest(f"unknown scope {scope!r}; known scopes: {known}", param="scopes")
    if header_only and not end_users:
        raise BadRequest(
            "header_only says how a key's end users are named: it goes with end_users",
            param="header_only",
        )
    token = token or KEY_PREFIX + secrets.token_urlsafe(24)
    key = Key(
        id=new_id("key_"),
        sha256=hash_key(token),
        user=user,
        name=name,
        scopes=wanted,
        deployments=None if deployments is None else sorted(set(deployments)),
        end_users=end_users,
        header_only=header_only,
        limits=dict(limits) if limits else None,
        created_by=created_by,
        created_by_key=created_by_key,
        created_at=now(),
    )
    session.add(key)
    session.flush()
    return key, token


def list_makers(session: Session, key_id: str | None) -> list[dict[str, str | None]]:
    """Who made a key, who made that one's, and so on: `user` and `key_id`, the nearest first.

    Empty for a key that was made on the machine itself.
    """
    found: list[dict[str, str | None]] = []
    key = None if key_id is None else session.get(Key, key_id)
    while key is not None and key.created_by is not None and len(found) < _MOST_MAKERS:
        found.append({"user": key.created_by, "key_id": key.created_by_key})
        key = None if key.created_by_key is None else session.get(Key, key.created_by_key)
    return found


def revoke_key(session: Session, key_id: str) -> Key:
    """Put a key out of force. Raises NotFound."""
    key = session.get(Key, key_id)
    if key is None or key.revoked_at is not None or Scope.INTERNAL in key.scopes:
        raise NotFound(f"no key {key_id!r} is in force")
    key.revoked_at = now()
    return key
