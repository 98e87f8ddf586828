"""Keys through the API."""

from __future__ import annotations

from sqlalchemy import select

from feedback.tables import AuditEntry
from server.tables import Key
from tests.gateway_fixtures import RunningGateway


def test_a_key_is_shown_once_stored_hashed_and_in_force_at_once(
    running_gateway: RunningGateway,
) -> None:
    admin = running_gateway.client()
    made = admin.post(
        "/admin/keys",
        json={"user": "anna", "scopes": ["chat", "feedback"], "deployments": ["assistant"]},
    )
    assert made.status_code == 201
    token = made.json()["key"]

    told = running_gateway.client(token).get("/admin/whoami").json()
    assert (told["user"], told["deployments"]) == ("anna", ["assistant"])
    listed = admin.get("/admin/keys").json()["data"]
    assert made.json()["id"] in [key["id"] for key in listed]
    assert not any("key" in key or "sha256" in key for key in listed)
    with running_gateway.database.read() as session:
        row = session.get_one(Key, made.json()["id"])
        assert token not in repr(vars(row))


def test_a_revoked_key_is_out_of_force_before_the_reply(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    made = admin.post("/admin/keys", json={"user": "anna", "scopes": ["chat"]}).json()
    anna = running_gateway.client(made["key"])
    assert anna.get("/v1/models").status_code == 200

    revoked = admin.delete(f"/admin/keys/{made['id']}")

    assert revoked.json()["revoked_at"] is not None
    assert anna.get("/v1/models").status_code == 401
    assert admin.delete(f"/admin/keys/{made['id']}").status_code == 404


def test_the_last_admin_key_stays(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    mine = admin.get("/admin/whoami").json()["key_id"]

    refused = admin.delete(f"/admin/keys/{mine}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "last_admin_key")

    limited = {"user": "bo", "scopes": ["admin"], "deployments": ["assistant"]}
    admin.post("/admin/keys", json=limited)
    assert admin.delete(f"/admin/keys/{mine}").status_code == 409
    admin.post("/admin/keys", json={"user": "bo", "scopes": ["admin"]})
    assert admin.delete(f"/admin/keys/{mine}").status_code == 200


def test_a_key_that_cannot_be_is_refused_by_name(sqlite_gateway: RunningGateway) -> None:
    refused: list[tuple[dict[str, object], int, str]] = [
        ({"scopes": ["internal"]}, 400, "scopes"),
        ({"scopes": ["root"]}, 400, "scopes"),
        ({"scopes": []}, 400, "scopes"),
        ({"deployments": ["nobody"]}, 404, "nobody"),
        ({"user": ""}, 400, "user"),
        ({"user": "a\0"}, 400, "user"),
        ({"expires": 3}, 400, "expires"),
        ({"header_only": True}, 400, "end_users"),
        ({"limits": {"requests_per_minute": 0}}, 400, "requests_per_minute"),
        ({"limits": {"tokens_per_minute": True}}, 400, "tokens_per_minute"),
        ({"limits": {"requests": 1}}, 400, "requests"),
    ]
    admin = sqlite_gateway.client()
    for change, status, names in refused:
        reply = admin.post("/admin/keys", json={"user": "anna", "scopes": ["chat"], **change})
        assert reply.status_code == status, change
        assert names in reply.json()["error"]["message"]
    with sqlite_gateway.database.read() as session:
        assert session.scalar(select(Key).where(Key.created_by.is_not(None))) is None


def test_the_workers_key_is_neither_listed_nor_revoked(sqlite_gateway: RunningGateway) -> None:
    with sqlite_gateway.database.read() as session:
        worker = session.scalars(select(Key).where(Key.user == "worker")).one()
    admin = sqlite_gateway.client()
    assert worker.id not in [key["id"] for key in admin.get("/admin/keys").json()["data"]]
    assert admin.delete(f"/admin/keys/{worker.id}").status_code == 404


def test_a_limited_administrator_makes_and_sees_keys_within_their_limits(
    sqlite_gateway: RunningGateway,
) -> None:
    limited = sqlite_gateway.client(sqlite_gateway.key("bo", "admin", deployments=["assistant"]))
    wide = {"user": "bo", "scopes": ["admin"]}

    assert limited.post("/admin/keys", json=wide).status_code == 403
    assert limited.post("/admin/keys", json={**wide, "deployments": ["other"]}).status_code == 404
    made = limited.post("/admin/keys", json={**wide, "deployments": ["assistant"]})
    assert made.status_code == 201
    assert {key["user"] for key in limited.get("/admin/keys").json()["data"]} == {"bo"}


def test_what_was_done_with_keys_is_written_down(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    made = admin.post("/admin/keys", json={"user": "anna", "scopes": ["chat"]}).json()
    admin.delete(f"/admin/keys/{made['id']}")
    with sqlite_gateway.database.read() as session:
        rows = session.scalars(select(AuditEntry).order_by(AuditEntry.seq)).all()
    assert [(row.action, row.subject, row.actor) for row in rows] == [
        ("key_created", made["id"], "admin"),
        ("key_revoked", made["id"], "admin"),
    ]
    assert made["key"] not in repr([row.details for row in rows])


def test_keys_page(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    for number in range(3):
        admin.post("/admin/keys", json={"user": f"user-{number}", "scopes": ["chat"]})
    first = admin.get("/admin/keys", params={"limit": 2}).json()
    rest = admin.get("/admin/keys", params={"limit": 2, "after": first["last_id"]}).json()
    assert [key["user"] for key in first["data"] + rest["data"]][:3] == [
        "user-2",
        "user-1",
        "user-0",
    ]
    assert (first["has_more"], rest["has_more"]) == (True, False)


def test_a_key_s_own_limits_are_kept_and_shown(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    for limits in ({"requests_per_minute": 60, "tokens_per_minute": None}, {}, None):
        body = {"user": "anna", "scopes": ["chat"], "limits": limits}
        made = admin.post("/admin/keys", json=body)
        assert made.status_code == 201
        assert made.json()["limits"] == (limits or {})
        assert admin.get("/admin/keys").json()["data"][0]["limits"] == (limits or {})


def test_a_limited_administrator_makes_no_key_for_people_beyond_their_limits(
    sqlite_gateway: RunningGateway,
) -> None:
    for user, more in (("anna", {}), ("bea", {"deployments": ["assistant", "other"]})):
        sqlite_gateway.key(user, **more)
    sqlite_gateway.key("carl", deployments=["assistant"])
    limited = sqlite_gateway.client(sqlite_gateway.key("bo", "admin", deployments=["assistant"]))

    def make(user: str) -> int:
        body = {"user": user, "scopes": ["chat"], "deployments": ["assistant"]}
        return limited.post("/admin/keys", json=body).status_code

    # A key beyond the limits makes its user one of those beyond, in force or not.
    assert [make(user) for user in ("admin", "worker", "anna", "bea")] == [403] * 4
    assert [make(user) for user in ("carl", "bo", "somebody new")] == [201] * 3


def test_whoever_made_a_key_stands_beside_the_actor_in_the_audit_log(
    sqlite_gateway: RunningGateway,
) -> None:
    admin = sqlite_gateway.client()
    first = admin.get("/admin/whoami").json()["key_id"]
    made = {}
    maker = admin
    for user in ("bo", "carl"):
        body = {"user": user, "scopes": ["admin"]}
        made[user] = maker.post("/admin/keys", json=body).json()
        maker = sqlite_gateway.client(made[user]["key"])
    maker.post("/admin/keys", json={"user": "dora", "scopes": ["chat"]})

    entries = admin.get("/admin/audit").json()["data"]

    assert [entry["actor"] for entry in entries] == ["carl", "bo", "admin"]
    by_admin = {"user": "admin", "key_id": first}
    assert entries[0]["key_id"] == made["carl"]["id"]
    assert entries[0]["made_by"] == [{"user": "bo", "key_id": made["bo"]["id"]}, by_admin]
    assert entries[1]["made_by"] == [by_admin]
    assert entries[2]["made_by"] == []  # a key that was made on the machine
