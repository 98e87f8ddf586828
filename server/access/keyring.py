"""Who asks: keys as requests see them, and the person that a request is for.

Owns: how a key is recognised, what it may do, the end user behind an application's key. Does not
own: how keys are made (`keys.py`), limits.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.db import now
from feedback.errors import BadRequest, Forbidden, NotAuthenticated
from feedback.people import ANONYMOUS, Viewer
from server.access.scopes import ROUTES, TOKEN_ROUTES, Scope
from server.access.tokens import TOKEN_PREFIX, Grant, read_token
from server.tables import Key


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key as requests see it; of a feedback token the key that made it, cut down to `grant`."""

    id: str
    sha256: str
    user: str
    scopes: frozenset[str]
    deployments: tuple[str, ...] | None
    end_users: bool
    header_only: bool = False  #: the end user is named by a header, and by nothing in a body
    limits: Mapping[str, int | None] = field(default_factory=dict)
    grant: Grant | None = None

    def allows(self, scope: Scope) -> bool:
        """`admin` holds every scope but the worker's; the worker may chat, for its evaluations."""
        if scope in self.scopes:
            return True
        if scope is Scope.CHAT and Scope.INTERNAL in self.scopes:
            return True
        return Scope.ADMIN in self.scopes and scope is not Scope.INTERNAL


class Keyring:
    """All keys in force, found by their hash, and what feedback tokens are signed with."""

    def __init__(self, keys: Mapping[str, KeyView], secret: str | None = None) -> None:
        self._keys = keys
        self._by_id = {key.id: key for key in keys.values()}
        self.secret = secret

    def authenticate(self, authorization: str | None) -> KeyView:
        """The key of an `Authorization: Bearer …` header, or of a feedback token there.

        Raises NotAuthenticated.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise NotAuthenticated("no API key was given; send 'Authorization: Bearer <key>'")
        if token.startswith(TOKEN_PREFIX):
            return self._key_of_token(token.strip())
        digest = hash_key(token.strip())
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.sha256, digest):
            raise NotAuthenticated("this API key is unknown or was revoked")
        return key

    def _key_of_token(self, token: str) -> KeyView:
        grant = read_token(token, self.secret, now())
        key = self._by_id.get(grant.key_id)
        if key is None:
            raise NotAuthenticated("the key that made this feedback token was revoked")
        return replace(key, scopes=frozenset({Scope.FEEDBACK}), end_users=False, grant=grant)


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated caller of a request: the key, and the person it speaks for."""

    key: KeyView
    person_id: str

    def viewer(self) -> Viewer:
        """Whose answers and verdicts this request may see."""
        return self._viewer(Scope.CURATE)

    def editor(self) -> Viewer:
        """Whose answers and verdicts this request may judge, change or delete.

        Those of others only for an administrator: a curator reads them.
        """
        return self._viewer(Scope.ADMIN)

    def _viewer(self, for_all: Scope) -> Viewer:
        return Viewer(
            user=self.key.user,
            person_id=self.person_id,
            key_id=self.key.id,
            # What comes through a front end is its end user's own, who may not be believed.
            speaks_for_many=self.key.end_users and not self.key.header_only,
            sees_all=self.key.allows(for_all),
            deployments=self.key.deployments,
        )


def hash_key(token: str) -> str:
    """sha256 of a key. Keys carry 192 bits of chance, so a slow hash would add nothing."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def check_scope(key: KeyView, method: str, path: str) -> None:
    """Raises Forbidden unless `key` holds what the route (`path` its template) needs."""
    if key.grant is not None and (method, path) not in TOKEN_ROUTES:
        raise Forbidden(
            "a feedback token opens POST /v1/feedback and GET /v1/feedback/{id} for its own "
            f"answer, not {method} {path}"
        )
    needed = ROUTES[method, path]
    if not key.allows(needed):
        raise Forbidden(
            f"this key has the scopes {', '.join(sorted(key.scopes)) or 'none'}; "
            f"{method} {path} needs '{needed}'"
        )


def end_user_of(
    key: KeyView, body: Mapping[str, Any], headers: Mapping[str, str], header_names: Iterable[str]
) -> str:
    """Which end user a request of an application's key is for.

    Empty for a key that speaks for one person.
    """
    if not key.end_users:
        return ""
    metadata = body.get("metadata")
    named = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    candidates = [body.get("safety_identifier"), body.get("user"), named]
    if key.header_only:
        candidates = []
    candidates += [headers.get(name.lower()) for name in header_names]
    found = next((c for c in candidates if isinstance(c, str) and c), ANONYMOUS)
    if len(found) > 256 or "\x00" in found:
        raise BadRequest("the end user's name has more than 256 characters or a NUL", param="user")
    return found


def load_keyring(session: Session, secret: str | None = None) -> Keyring:
    """All keys in force; `secret` is what feedback tokens are signed with."""
    rows = session.scalars(select(Key).where(Key.revoked_at.is_(None)))
    return Keyring(
        {
            row.sha256: KeyView(
                id=row.id,
                sha256=row.sha256,
                user=row.user,
                scopes=frozenset(row.scopes),
                deployments=None if row.deployments is None else tuple(row.deployments),
                end_users=row.end_users,
                header_only=row.header_only,
                limits=row.limits or {},
            )
            for row in rows
        },
        secret,
    )
