"""Keys, scopes, and on whose behalf a request is made.

Owns: how a key is made and recognised, the table that says which route needs which scope, the
person behind a request. Does not own: limits, or what a scope's routes do.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.routing import Route as HttpRoute

from feedback.db import new_id, now
from feedback.errors import BadRequest, Forbidden, NotAuthenticated, NotFound
from feedback.people import ANONYMOUS, Viewer
from server.access.tokens import TOKEN_PREFIX, Grant, read_token
from server.tables import Key

KEY_PREFIX = "sk-burnish-"

_MOST_MAKERS = 16  #: of a chain of keys, in one audit entry


class Scope(StrEnum):
    CHAT = "chat"  #: chat, text completions, models, one's own stored completions
    FEEDBACK = "feedback"  #: judge one's own answers
    RATE = "rate"  #: judge what a batch or the queue hands out
    CURATE = "curate"  #: read everybody's answers and judgements, make data sets
    TUNE = "tune"  #: jobs, files, evaluations
    PROMOTE = "promote"  #: move releases
    ADMIN = "admin"  #: all of the above, keys, deployments, audit
    INTERNAL = "internal"  #: the worker's way to the gateway; no key made through the API has it


PUBLIC: frozenset[tuple[str, str]] = frozenset(
    {
        ("GET", "/"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/openapi.json"),
        ("GET", "/static/{path:path}"),
    }
)

ROUTES: Mapping[tuple[str, str], Scope] = {
    ("POST", "/v1/chat/completions"): Scope.CHAT,
    ("GET", "/v1/chat/completions"): Scope.CHAT,
    ("GET", "/v1/chat/completions/{completion_id}"): Scope.CHAT,
    ("POST", "/v1/chat/completions/{completion_id}"): Scope.CHAT,
    ("DELETE", "/v1/chat/completions/{completion_id}"): Scope.CHAT,
    ("GET", "/v1/chat/completions/{completion_id}/messages"): Scope.CHAT,
    ("POST", "/v1/completions"): Scope.CHAT,
    ("GET", "/v1/models"): Scope.CHAT,
    ("GET", "/v1/models/{model:path}"): Scope.CHAT,
    ("POST", "/v1/feedback"): Scope.FEEDBACK,
    ("POST", "/v1/feedback/tokens"): Scope.FEEDBACK,
    ("GET", "/v1/feedback"): Scope.FEEDBACK,
    ("GET", "/v1/feedback/{judgement_id}"): Scope.FEEDBACK,
    ("DELETE", "/v1/feedback/{judgement_id}"): Scope.FEEDBACK,
    ("POST", "/v1/comparisons"): Scope.FEEDBACK,
    ("GET", "/v1/files"): Scope.TUNE,
    ("POST", "/v1/files"): Scope.TUNE,
    ("GET", "/v1/files/{file_id}"): Scope.TUNE,
    ("DELETE", "/v1/files/{file_id}"): Scope.TUNE,
    ("GET", "/v1/files/{file_id}/content"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Scope.TUNE,
    ("GET", "/admin/whoami"): Scope.CHAT,
    ("GET", "/admin/deployments"): Scope.CURATE,
    ("POST", "/admin/deployments"): Scope.ADMIN,
    ("GET", "/admin/deployments/{name}"): Scope.CURATE,
    ("PATCH", "/admin/deployments/{name}"): Scope.ADMIN,
    ("POST", "/admin/deployments/{name}/promote"): Scope.PROMOTE,
    ("POST", "/admin/deployments/{name}/rollback"): Scope.PROMOTE,
    ("GET", "/admin/releases"): Scope.CURATE,
    ("GET", "/admin/releases/{name}"): Scope.CURATE,
    ("POST", "/admin/releases/{name}/discard"): Scope.PROMOTE,
    ("GET", "/admin/adapters/{adapter_id}"): Scope.CURATE,
    ("POST", "/admin/datasets"): Scope.CURATE,
    ("GET", "/admin/datasets"): Scope.CURATE,
    ("GET", "/admin/datasets/{dataset_id}"): Scope.CURATE,
    ("POST", "/admin/evaluations"): Scope.TUNE,
    ("GET", "/admin/evaluations"): Scope.CURATE,
    ("GET", "/admin/evaluations/{evaluation_id}"): Scope.CURATE,
    ("GET", "/admin/jobs"): Scope.TUNE,
    ("GET", "/admin/jobs/{job_id}"): Scope.TUNE,
    ("GET", "/admin/explain/{subject}"): Scope.CURATE,
    ("POST", "/admin/keys"): Scope.ADMIN,
    ("GET", "/admin/keys"): Scope.ADMIN,
    ("DELETE", "/admin/keys/{key_id}"): Scope.ADMIN,
    ("GET", "/admin/audit"): Scope.ADMIN,
    ("GET", "/admin/audit/verify"): Scope.ADMIN,
    ("GET", "/metrics"): Scope.ADMIN,
    ("POST", "/internal/evaluation-slot"): Scope.INTERNAL,
    ("POST", "/internal/evaluation-slot/{token}/beat"): Scope.INTERNAL,
    ("DELETE", "/internal/evaluation-slot/{token}"): Scope.INTERNAL,
    ("POST", "/internal/score"): Scope.INTERNAL,
}
"""Which route needs which scope.

A route that stands neither here nor in `PUBLIC` stops the gateway's start.
"""


TOKEN_ROUTES = frozenset({("POST", "/v1/feedback"), ("GET", "/v1/feedback/{judgement_id}")})
"""What a feedback token opens, for its one answer."""


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


def check_routes(routes: Iterable[Any]) -> None:
    """Check that every route is public or in the table, and every row of the table a route.

    Raises RuntimeError otherwise.
    """
    seen = {
        (method, route.path)
        for route in routes
        if isinstance(route, HttpRoute)
        for method in (route.methods or set()) - {"HEAD"}
    }
    listed = ROUTES.keys() | PUBLIC
    if seen - listed or ROUTES.keys() - seen:
        raise RuntimeError(
            f"routes without a scope: {sorted(seen - listed)}; "
            f"scopes without a route: {sorted(ROUTES.keys() - seen)}"
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
