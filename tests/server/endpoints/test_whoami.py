"""What the gateway takes a key for."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway


def test_a_key_is_told_whose_it_is_and_what_it_may_do(sqlite_gateway: RunningGateway) -> None:
    key = sqlite_gateway.key("shop", "chat", deployments=["assistant"], end_users=True)
    told = sqlite_gateway.client(key).get("/admin/whoami").json()
    assert told.pop("key_id").startswith("key_")
    assert told == {
        "user": "shop",
        "scopes": ["chat"],
        "deployments": ["assistant"],
        "end_users": True,
        "header_only": False,
    }
