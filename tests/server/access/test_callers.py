from __future__ import annotations

from typing import Any

import pytest

from feedback.errors import Forbidden, NotAuthenticated
from server.access.callers import Callers
from server.access.keyring import Keyring, hash_key
from tests.gateway_fixtures import RunningGateway


def test_people_are_remembered_and_forgotten_by_user(sqlite_gateway: RunningGateway) -> None:
    gateway = sqlite_gateway.gateway
    first = sqlite_gateway.run(gateway.callers.person_id("app", "one"))
    other = sqlite_gateway.run(gateway.callers.person_id("app", "two"))
    assert first != other
    assert sqlite_gateway.run(gateway.callers.person_id("app", "one")) == first
    gateway.callers.forget("app")
    assert gateway.callers._people == {}
    assert sqlite_gateway.run(gateway.callers.person_id("app", "one")) == first


def asked_with(authorization: str | None) -> dict[str, Any]:
    shown = [] if authorization is None else [(b"authorization", authorization.encode())]
    return {"type": "http", "headers": [(b"accept", b"*/*"), *shown]}


def test_a_request_is_authenticated_once(
    sqlite_gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = sqlite_gateway.key("anna")
    callers, keyring = sqlite_gateway.gateway.callers, sqlite_gateway.gateway.directory.keyring
    scope = asked_with(f"Bearer {token}")
    key = callers.authenticate(scope)
    assert key.sha256 == hash_key(token)

    def never(_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(keyring, "authenticate", never)
    assert callers.authorize(scope, "POST", "/v1/chat/completions") is key
    with pytest.raises(Forbidden, match="needs 'admin'"):
        callers.authorize(scope, "GET", "/admin/keys")


def test_a_key_that_is_revoked_while_a_body_arrives_is_out_of_force(
    sqlite_gateway: RunningGateway,
) -> None:
    in_force = [sqlite_gateway.gateway.directory.keyring]
    callers = Callers(sqlite_gateway.database, lambda: in_force[-1], [])
    scope = asked_with(f"Bearer {sqlite_gateway.admin_key}")
    callers.authenticate(scope)
    in_force.append(Keyring({}))
    with pytest.raises(NotAuthenticated, match="revoked"):
        callers.authorize(scope, "POST", "/v1/chat/completions")


@pytest.mark.parametrize("shown", [None, "", "Bearer ", "Basic abc", "Bearer nobody's"])
def test_a_request_without_a_key_in_force_is_refused(
    sqlite_gateway: RunningGateway, shown: str | None
) -> None:
    scope = asked_with(shown)
    for _ in range(2):  # a refusal is not taken for a key
        with pytest.raises(NotAuthenticated):
            sqlite_gateway.gateway.callers.authenticate(scope)
