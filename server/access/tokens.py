"""Feedback tokens: the right to judge one answer, from a browser that has no API key.

Owns: what a token says, how it is signed and read. A token is valid on every gateway that has the
same secret until it expires by the wall clock (UTC), its key is revoked, or there is a new secret.
It is stored nowhere. Does not own: the secret (`signing.py`), what may be done with a token
(`scopes.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from itsdangerous import BadData, URLSafeSerializer

from feedback.errors import NotAuthenticated

TOKEN_PREFIX = "fbt-burnish-"

_MOST_CHARACTERS = 2048
_SALT = "burnish feedback token"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows: to judge this answer as this person, while the key is in force."""

    answer_id: str
    person_id: str
    key_id: str
    expires_at: int  #: seconds since 1970, UTC


def sign(grant: Grant, secret: str) -> str:
    """The token of a grant."""
    said = [grant.answer_id, grant.person_id, grant.key_id, grant.expires_at]
    return TOKEN_PREFIX + _signer(secret).dumps(said)


def read_token(token: str, secret: str | None, at: datetime) -> Grant:
    """Verify a token and return what it allows at that time.

    Raises NotAuthenticated, with a code of its own when the token has expired.
    """
    unknown = NotAuthenticated("this feedback token is not one of ours, or no longer; ask anew")
    if secret is None or len(token) > _MOST_CHARACTERS:
        raise unknown
    try:
        said = _signer(secret).loads(token.removeprefix(TOKEN_PREFIX))
    except BadData:
        raise unknown from None
    grant = Grant(*said)
    if at.timestamp() >= grant.expires_at:
        expired = datetime.fromtimestamp(grant.expires_at, UTC).isoformat()
        raise NotAuthenticated(
            f"this feedback token expired at {expired}; ask for another", code="token_expired"
        )
    return grant


def _signer(secret: str) -> URLSafeSerializer:
    return URLSafeSerializer(
        secret,
        salt=_SALT,
        signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"},
    )
