"""What a caller may name as `model`."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tuner import releases


def test_the_list_has_deployments_aliases_and_the_base_of_the_key(
    sqlite_gateway: RunningGateway,
) -> None:
    everything = sqlite_gateway.client(sqlite_gateway.key("anna")).get("/v1/models").json()
    nothing = sqlite_gateway.client(sqlite_gateway.key("bert", deployments=["writer"]))
    assert [m["id"] for m in everything["data"]] == ["assistant", "gpt-4o-mini", "tiny"]
    assert nothing.get("/v1/models").json()["data"] == []
    assert nothing.get("/v1/models/assistant").status_code == 404
    assert nothing.get("/v1/models/assistant@0").status_code == 404


def test_a_release_is_found_by_name_until_it_is_put_away(running_gateway: RunningGateway) -> None:
    client = running_gateway.client(running_gateway.key("anna"))
    candidate = running_gateway.candidate(1)
    assert client.get(f"/v1/models/{candidate.name}").json()["parent"] == "assistant"
    with running_gateway.database.write() as session:
        releases.discard(session, candidate.name)
    for name in (candidate.name, "assistant@7", "x@%00", "../../etc", "%2Fetc%2Fpasswd"):
        reply = client.get(f"/v1/models/{name}")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] in ("model_not_found", "not_found")
