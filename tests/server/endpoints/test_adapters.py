"""Adapters through the API."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_candidate, add_deployment, build_adapter


def test_an_adapter_names_the_releases_that_the_key_sees(sqlite_gateway: RunningGateway) -> None:
    add_deployment(sqlite_gateway.database, "poet")
    adapter = build_adapter()
    name = add_candidate(sqlite_gateway.database, adapter=adapter)
    limited = {
        deployment: sqlite_gateway.client(
            sqlite_gateway.key("bo", "curate", deployments=[deployment])
        )
        for deployment in ("assistant", "poet")
    }
    path = f"/admin/adapters/{adapter.id}"

    shown = limited["assistant"].get(path).json()

    assert (shown["id"], shown["content_hash"]) == (adapter.id, adapter.content_hash)
    assert (shown["r"], shown["lora_alpha"], shown["releases"]) == (8, 16.0, [name])
    assert limited["poet"].get(path).status_code == 404
    assert sqlite_gateway.client().get("/admin/adapters/ad_none").status_code == 404
