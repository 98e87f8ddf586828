"""What a feedback token says, and that nobody else can say it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from feedback.errors import NotAuthenticated
from server.access.tokens import Grant, read_token, sign

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
    for forged in (mixed, token[:-2], token + "A", token.partition(".")[0], "fbt-burnish-", "é"):
        with pytest.raises(NotAuthenticated) as refused:
            read_token(forged, "secret", AT)
        assert refused.value.code == "invalid_api_key"
    for secret in ("other", None):
        with pytest.raises(NotAuthenticated):
            read_token(token, secret, AT)
