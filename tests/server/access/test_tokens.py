"""What a feedback token says, and that nobody else can say it."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import astuple, replace
from datetime import UTC, datetime, timedelta

import pytest
from itsdangerous import URLSafeSerializer

from feedback.errors import NotAuthenticated
from server.access.tokens import TOKEN_PREFIX, Grant, read_token, sign

AT = datetime(2026, 1, 1, tzinfo=UTC)
GRANT = Grant("chatcmpl-1", "person_1", "key_1", int(AT.timestamp()) + 60)


def test_a_token_says_what_was_signed_until_it_expires() -> None:
    token = sign(GRANT, "secret")
    assert read_token(token, "secret", AT) == GRANT
    assert read_token(token, "secret", AT + timedelta(seconds=59)) == GRANT
    with pytest.raises(NotAuthenticated, match="2026-01-01T00:01:00") as refused:
        read_token(token, "secret", AT + timedelta(seconds=60))
    assert refused.value.code == "token_expired"


def test_an_altered_token_and_another_secret_are_refused() -> None:
    token = sign(GRANT, "secret")
    other = sign(Grant("chatcmpl-2", "person_1", "key_1", GRANT.expires_at), "secret")
    mixed = other.partition(".")[0] + "." + token.partition(".")[2]
    cut = token.partition(".")[0]
    for forged in (mixed, token[:-2], token + "A", cut, "fbt-burnish-", "é", "fbt-burnish-é.é"):
        with pytest.raises(NotAuthenticated) as refused:
            read_token(forged, "secret", AT)
        assert refused.value.code == "invalid_api_key"
    for secret in ("other", None):
        with pytest.raises(NotAuthenticated):
            read_token(token, secret, AT)


def test_what_is_too_long_to_be_a_token_is_refused_before_it_is_worked_on() -> None:
    """Here it is signed, so that its length alone can be what is refused."""
    long = sign(replace(GRANT, answer_id=secrets.token_hex(2048)), "secret")
    with pytest.raises(NotAuthenticated, match="not one of ours"):
        read_token(long, "secret", AT)


def test_what_is_signed_for_another_use_is_no_token() -> None:
    kwargs = {"digest_method": hashlib.sha256, "key_derivation": "hmac"}
    other = URLSafeSerializer("secret", "another use", signer_kwargs=kwargs)
    with pytest.raises(NotAuthenticated):
        read_token(TOKEN_PREFIX + other.dumps(list(astuple(GRANT))), "secret", AT)
