"""The audit log through the API."""

from __future__ import annotations

from feedback import audit
from tests.gateway_fixtures import RunningGateway


def test_entries_come_newest_first_with_what_their_hash_covers(
    sqlite_gateway: RunningGateway,
) -> None:
    with sqlite_gateway.database.write() as session:
        for number in range(3):
            audit.append(session, actor="a", action=f"act_{number % 2}", subject="s", details={})
    admin = sqlite_gateway.client()

    first = admin.get("/admin/audit", params={"limit": 2}).json()
    rest = admin.get("/admin/audit", params={"after": first["last_id"]}).json()
    by_action = admin.get("/admin/audit", params={"action": "act_1"}).json()["data"]

    entries = first["data"] + rest["data"]
    assert [entry["id"] for entry in entries] == [3, 2, 1]
    assert [entry["id"] for entry in by_action] == [2]
    assert [entry["previous_hash"] for entry in entries[:2]] == [
        entry["hash"] for entry in entries[1:]
    ]


def test_a_key_that_is_limited_to_deployments_does_not_read_it(
    sqlite_gateway: RunningGateway,
) -> None:
    limited = sqlite_gateway.client(sqlite_gateway.key("bo", "admin", deployments=["assistant"]))
    assert limited.get("/admin/audit").status_code == 403
    assert limited.get("/admin/audit/verify").status_code == 403


def test_the_log_is_verified_and_what_was_altered_is_named(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    for user in ("anna", "bea"):
        admin.post("/admin/keys", json={"user": user, "scopes": ["chat"]})
    whole = admin.get("/admin/audit/verify").json()
    assert (whole["whole"], whole["entries"], whole["signed_from"]) == (True, 2, 1)

    with sqlite_gateway.database.write() as session:
        entry = audit.list_entries(session)[0][1]
        entry.actor = "eve"
        entry.hash = audit.build_hash(entry)
    found = admin.get("/admin/audit/verify").json()
    assert (found["whole"], found["altered"]) == (False, 1)
    assert "entry 1 of the audit log (key_created" in found["message"]
