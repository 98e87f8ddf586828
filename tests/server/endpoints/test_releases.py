"""Releases through the API."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_candidate, add_deployment, add_evaluation, build_adapter
from tuner.tables import Decision


def test_a_release_shows_its_role_and_its_newest_evaluation(
    running_gateway: RunningGateway,
) -> None:
    adapter = build_adapter()
    name = add_candidate(running_gateway.database, adapter=adapter, dataset_id="ds_1")
    admin = running_gateway.client()
    before = admin.get(f"/admin/releases/{name}").json()
    decided = add_evaluation(running_gateway.database, name, Decision.INCONCLUSIVE)
    after = admin.get(f"/admin/releases/{name}").json()

    assert (before["adapter"], before["dataset_id"]) == (adapter.id, "ds_1")
    assert (before["role"], before["evaluation"]) == (None, None)
    assert after["evaluation"] == {
        "id": decided.id,
        "decision": "inconclusive",
        "reasons": ["It was decided."],
        "checks": [],
        "baseline": "assistant@0",
    }
    assert admin.get("/admin/releases/assistant@0").json()["role"] == "production"


def test_releases_page_by_deployment_newest_first(sqlite_gateway: RunningGateway) -> None:
    add_deployment(sqlite_gateway.database, "poet")
    for _ in range(2):
        add_candidate(sqlite_gateway.database)
    admin = sqlite_gateway.client()

    first = admin.get("/admin/releases", params={"limit": 2}).json()
    rest = admin.get("/admin/releases", params={"limit": 2, "after": first["last_id"]}).json()
    of_one = admin.get("/admin/releases", params={"deployment": "poet"}).json()

    names = [row["name"] for row in first["data"] + rest["data"]]
    assert names == ["assistant@2", "assistant@1", "assistant@0", "poet@0"]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [row["name"] for row in of_one["data"]] == ["poet@0"]
    unknown = admin.get("/admin/releases", params={"deployment": "nobody"})
    assert unknown.status_code == 404


def test_a_discarded_release_stays_away_and_production_cannot_be_discarded(
    running_gateway: RunningGateway,
) -> None:
    name = add_candidate(running_gateway.database)
    admin = running_gateway.client()

    gone = admin.post(f"/admin/releases/{name}/discard", json={"reason": "Too terse."}).json()
    in_use = admin.post("/admin/releases/assistant@0/discard")

    assert (gone["state"], gone["state_reason"]) == ("discarded", "Too terse.")
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "release_in_use")
    entries = admin.get("/admin/audit", params={"subject": name}).json()["data"]
    assert [entry["action"] for entry in entries] == ["release_discarded"]
