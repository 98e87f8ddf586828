"""Deployments and their moves through the API."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import select

from feedback.tables import AuditEntry
from server.chat import request
from server.endpoints.deployments import SamplingDefaults
from tests.chat_templates import NO_SYSTEM
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_candidate, add_deployment, add_evaluation, build_adapter
from tuner.chat_template import ChatTemplate
from tuner.tables import Decision, Release


def test_a_deployment_shows_its_roles_and_what_engines_hold(
    running_gateway: RunningGateway,
) -> None:
    shown = running_gateway.client().get("/admin/deployments/assistant").json()
    assert isinstance(shown.pop("created_at"), int)
    assert shown == {
        "id": "assistant",
        "name": "assistant",
        "object": "deployment",
        "base_model": "tiny",
        "production": "assistant@0",
        "previous": None,
        "canary": None,
        "canary_percent": 0.0,
        "generation": 0,
        "rolled_back": False,
        "aliases": ["gpt-4o-mini"],
        "system_prompt": None,
        "sampling": {},
        "policies": {},
        "sources": [],
        "engines": [
            {
                "id": "engine-0",
                "state": "ready",
                "reason": None,
                "adapter_slots": 4,
                "releases": ["assistant@0"],
            }
        ],
    }


def test_a_new_deployment_answers_to_its_names_at_once(running_gateway: RunningGateway) -> None:
    running_gateway.set_capacity(7)
    admin = running_gateway.client()
    made = admin.post(
        "/admin/deployments",
        json={
            "name": "poet",
            "system_prompt": "Rhyme.",
            "sampling": {"temperature": 0.5, "stop": ["\n"]},
            "aliases": ["gpt-4"],
            "policies": {"system_prompt": "prepend", "curation": {"person_cap": 5}},
        },
    )
    assert made.status_code == 201
    assert (made.json()["system_prompt"], made.json()["sampling"]) == (
        "Rhyme.",
        {"temperature": 0.5, "stop": ["\n"]},
    )
    assert {"poet", "gpt-4"} <= {model["id"] for model in admin.get("/v1/models").json()["data"]}
    assert running_gateway.gateway.directory.snapshot.deployments["poet"].prepend
    listed = [row["name"] for row in admin.get("/admin/deployments").json()["data"]]
    assert listed == ["assistant", "poet"]


def test_a_deployment_beyond_the_slots_is_refused(sqlite_gateway: RunningGateway) -> None:
    reply = sqlite_gateway.client().post("/admin/deployments", json={"name": "poet"})
    assert reply.status_code == 409
    assert "engine.max_loras" in reply.json()["error"]["message"]
    # What is wrong with it otherwise is told before.
    for name, status, code in (("assistant", 409, "name_taken"), ("a b", 400, None)):
        reply = sqlite_gateway.client().post("/admin/deployments", json={"name": name})
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_what_no_deployment_can_be_is_refused_by_name(sqlite_gateway: RunningGateway) -> None:
    sqlite_gateway.set_capacity(7)
    refused: list[tuple[dict[str, object], int, str]] = [
        ({"name": "assistant"}, 409, "name"),
        ({"name": "No Name"}, 400, "name"),
        ({"base_model": "other"}, 400, "base_model"),
        ({"sampling": {"temperature": 3}}, 400, "sampling.temperature"),
        ({"sampling": {"heat": 1}}, 400, "sampling.heat"),
        ({"policies": {"curation": {"cap": 1}}}, 400, "policy"),
        ({"policies": {"system_prompt": "append"}}, 400, "policies.system_prompt"),
        ({"aliases": ["gpt-4o-mini"]}, 409, "aliases"),
        ({"base": "tiny"}, 400, "base"),
    ]
    admin = sqlite_gateway.client()
    for change, status, param in refused:
        reply = admin.post("/admin/deployments", json={"name": "poet", **change})
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert len(admin.get("/admin/deployments").json()["data"]) == 1


def test_a_new_prompt_makes_a_candidate_and_changes_no_answer(
    running_gateway: RunningGateway,
) -> None:
    admin = running_gateway.client()
    changed = admin.patch("/admin/deployments/assistant", json={"system_prompt": "Be brief."})

    assert changed.json()["candidate"] == "assistant@1"
    assert (changed.json()["production"], changed.json()["system_prompt"]) == ("assistant@0", None)
    candidate = admin.get("/admin/releases/assistant@1").json()
    assert (candidate["system_prompt"], candidate["state"]) == ("Be brief.", "candidate")


def test_a_candidate_with_another_prompt_keeps_what_production_learned_from(
    sqlite_gateway: RunningGateway,
) -> None:
    with sqlite_gateway.database.write() as session:
        adapter = build_adapter()
        session.add(adapter)
        session.flush()
        production = session.get_one(Release, "assistant@0")
        production.adapter_id, production.job_id = adapter.id, "ftjob-1"
        production.dataset_id, production.sources_left_out = "ds_1", ["ds_0"]
    changed = sqlite_gateway.client().patch(
        "/admin/deployments/assistant", json={"sampling": {"temperature": 0.2}}
    )
    with sqlite_gateway.database.read() as session:
        row = session.get_one(Release, changed.json()["candidate"])
    assert (row.adapter_id, row.job_id, row.dataset_id, row.sources_left_out) == (
        adapter.id,
        "ftjob-1",
        "ds_1",
        ["ds_0"],
    )


def test_aliases_and_policies_act_at_once(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    changed = admin.patch(
        "/admin/deployments/assistant",
        json={"aliases": ["gpt-4"], "policies": {"template_kwargs": ["thinking"]}},
    ).json()
    assert (changed["candidate"], changed["aliases"]) == (None, ["gpt-4"])
    snapshot = running_gateway.gateway.directory.snapshot
    assert snapshot.aliases == {"gpt-4": "assistant"}
    assert snapshot.deployments["assistant"].template_kwargs == {"thinking"}

    body = {"policies": {"curation": {"person_cap": 5}, "template_kwargs": None}}
    changed = admin.patch("/admin/deployments/assistant", json=body).json()
    assert changed["policies"] == {"curation": {"person_cap": 5}}


def test_the_same_prompt_again_makes_no_candidate(sqlite_gateway: RunningGateway) -> None:
    body = {"system_prompt": None, "sampling": {}}
    reply = sqlite_gateway.client().patch("/admin/deployments/assistant", json=body)
    assert reply.json()["candidate"] is None


@pytest.mark.parametrize("name", ["base", "base_model"])
def test_the_base_cannot_be_changed(sqlite_gateway: RunningGateway, name: str) -> None:
    reply = sqlite_gateway.client().patch("/admin/deployments/assistant", json={name: "other"})
    assert reply.status_code == 400
    assert "another deployment" in reply.json()["error"]["message"]


def test_a_passed_candidate_is_promoted_and_rolled_back(running_gateway: RunningGateway) -> None:
    name = add_candidate(running_gateway.database)
    evaluation = add_evaluation(running_gateway.database, name)
    mover = running_gateway.client(running_gateway.key("mo", "promote"))

    promoted = mover.post(
        "/admin/deployments/assistant/promote", json={"release": name, "expected_generation": 0}
    )
    assert promoted.status_code == 200, promoted.text
    assert (promoted.json()["production"], promoted.json()["previous"]) == (name, "assistant@0")
    assert promoted.json()["generation"] == 1
    assert promoted.json()["system_prompt"] is None  # this key may not read it
    held = running_gateway.gateway.directory.snapshot.deployments["assistant"].production
    assert held.name == name

    back = mover.post("/admin/deployments/assistant/rollback").json()
    assert (back["production"], back["previous"], back["rolled_back"]) == (
        "assistant@0",
        name,
        True,
    )
    with running_gateway.database.read() as session:
        rows = session.scalars(select(AuditEntry).order_by(AuditEntry.seq)).all()
    assert [(row.action, row.actor, row.subject) for row in rows] == [
        ("promote", "mo", name),
        ("rollback", "mo", "assistant@0"),
    ]
    assert rows[0].details["evaluation"] == evaluation.id


def test_moves_that_the_rules_forbid_change_nothing(sqlite_gateway: RunningGateway) -> None:
    database = sqlite_gateway.database
    failed, unknown = add_candidate(database), add_candidate(database, system_prompt="Rhyme.")
    add_evaluation(database, failed, Decision.FAIL)
    promote, rollback = (f"/admin/deployments/assistant/{move}" for move in ("promote", "rollback"))
    refused: list[tuple[str, dict[str, object], int, str | None]] = [
        (promote, {"release": failed}, 409, "evaluation_failed"),
        (promote, {"release": unknown}, 409, "not_evaluated"),
        (promote, {"release": unknown, "force": True}, 400, None),
        (promote, {"release": "assistant@9"}, 404, "not_found"),
        (promote, {"release": failed, "expected_generation": 7}, 409, "generation_conflict"),
        (promote, {"release": unknown, "note": "x" * 2001, "force": True}, 400, None),
        (rollback, {}, 409, "nothing_to_roll_back_to"),
    ]
    admin = sqlite_gateway.client()
    for path, body, status, code in refused:
        reply = admin.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), body
    assert admin.get("/admin/deployments/assistant").json()["generation"] == 0


def test_a_new_deployment_needs_a_key_that_reaches_it(sqlite_gateway: RunningGateway) -> None:
    sqlite_gateway.set_capacity(7)
    limited = sqlite_gateway.client(sqlite_gateway.key("bo", "admin", deployments=["assistant"]))
    assert limited.post("/admin/deployments", json={"name": "poet"}).status_code == 403
    add_deployment(sqlite_gateway.database, "poet")
    listed = limited.get("/admin/deployments").json()["data"]
    assert [row["name"] for row in listed] == ["assistant"]


def test_sampling_defaults_have_the_bounds_of_requests() -> None:
    ours = SamplingDefaults.model_json_schema()["properties"]
    theirs = request.Sampling.model_json_schema()["properties"]
    assert ours == {name: theirs[name] for name in ours}


def test_a_system_prompt_that_the_base_s_template_refuses_is_refused(
    running_gateway: RunningGateway,
) -> None:
    gateway, admin = running_gateway.gateway, running_gateway.client()
    gateway.base = replace(gateway.base, chat_template=ChatTemplate(NO_SYSTEM))
    running_gateway.set_capacity(7)
    replies = [
        admin.post("/admin/deployments", json={"name": "poet", "system_prompt": "Rhyme."}),
        admin.patch("/admin/deployments/assistant", json={"system_prompt": "Rhyme."}),
    ]
    for reply in replies:
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "system_prompt")
        assert "System role not supported" in error["message"]
    unset = admin.patch("/admin/deployments/assistant", json={"system_prompt": None})
    assert unset.status_code == 200


def test_what_is_longer_than_the_audit_log_keeps_is_written_down_in_short(
    sqlite_gateway: RunningGateway,
) -> None:
    sqlite_gateway.set_capacity(7)
    admin = sqlite_gateway.client()
    names = [f"a{number:03d}{'x' * 124}" for number in range(64)]
    curation = {"curation": {"excluded_people": [f"person_{number}" for number in range(2_000)]}}
    body = {"name": "second", "aliases": names, "policies": curation}
    made = admin.post("/admin/deployments", json=body)
    assert (made.status_code, made.json()["aliases"]) == (201, names)
    changed = admin.patch("/admin/deployments/second", json={"policies": curation})
    assert changed.status_code == 200, changed.text
    with sqlite_gateway.database.read() as session:
        found = {e.action: e.details for e in session.scalars(select(AuditEntry))}
    aliases = found["deployment_created"]["aliases"]
    assert aliases["begins"].startswith(f'["{names[0]}",')
    assert aliases["characters"] > 64 * 128
