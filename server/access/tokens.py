"""Feedback tokens: the right to judge one answer, from a browser that has no API key.

Owns: what a token says, how it is signed and read. A token is valid on every gateway that has the
same secret until it expires by the wall clock (UTC), its key is revoked, or there is a new secret.
It is stored nowhere. Does not own: the secret (`signing.py`), what may be done with a token
(`keys.py`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from feedback.errors import NotAuthenticated

TOKEN_PREFIX = "fbt-burnish-"

_MOST_CHARACTERS = 2048


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows: to judge this answer as this person, while the key is in force."""

    answer_id: str
    person_id: str
    key_id: str
    expires_at: int  #: seconds since 1970, UTC


def sign(grant: Grant, secret: str) -> str:
    """The token of a grant."""
    payload = json.dumps(
        [grant.answer_id, grant.person_id, grant.key_id, grant.expires_at], separators=(",", ":")
    ).encode()
    return f"{TOKEN_PREFIX}{_encode(payload)}.{_encode(_signature(payload, secret))}"


def read_token(token: str, secret: str | None, at: datetime) -> Grant:
    """Verify a token and return what it allows at that time.

    Raises NotAuthenticated, with a code of its own when the token has expired.
    """
    payload_text, _, signature_text = token.removeprefix(TOKEN_PREFIX).partition(".")
    try:
        payload = _decode(payload_text if len(token) <= _MOST_CHARACTERS else "")
        signature = _decode(signature_text)
    except (ValueError, binascii.Error):
        payload, signature = b"", b""
    if secret is None or not hmac.compare_digest(_signature(payload, secret), signature):
        raise NotAuthenticated("this feedback token is not one of ours, or no longer; ask anew")
    grant = Grant(*json.loads(payload))
    if at.timestamp() >= grant.expires_at:
        expired = datetime.fromtimestamp(grant.expires_at, UTC).isoformat()
        raise NotAuthenticated(
            f"this feedback token expired at {expired}; ask for another", code="token_expired"
        )
    return grant


def _signature(payload: bytes, secret: str) -> bytes:
    return hmac.new(secret.encode(), payload, hashlib.sha256).digest()


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
