"""Verdicts through the API."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import httpx
import pytest

from feedback.db import now
from feedback.tables import Answer, AnswerStatus
from server.access.tokens import Grant, sign
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer, add_dataset
from tuner.deployments import get_deployment


def _rate(client: httpx.Client, completion_id: str, value: Any = True, **more: Any) -> Any:
    body = {"completion_id": completion_id, "kind": "rating", "value": value, **more}
    return client.post("/v1/feedback", json=body)


def test_a_verdict_is_new_once_and_then_stands(running_gateway: RunningGateway) -> None:
    answer = add_answer(running_gateway.database, "anna")
    anna = running_gateway.client(running_gateway.key("anna"))

    first = _rate(anna, answer, comment="Right.", reasons=["correct"], metadata={"page": "1"})
    again = _rate(anna, answer, comment="Right.", reasons=["correct"], metadata={"page": "1"})

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    said = first.json()
    assert said["id"].startswith("fb_")
    assert isinstance(said.pop("created_at"), int)
    assert isinstance(said.pop("updated_at"), int)
    del said["id"]
    assert said == {
        "object": "feedback",
        "completion_id": answer,
        "conversation_id": None,
        "choice_index": 0,
        "kind": "rating",
        "value": True,
        "name": "",
        "comment": "Right.",
        "reasons": ["correct"],
        "source": {"type": "human", "id": ""},
        "user": "anna",
        "metadata": {"page": "1"},
        "revision": 1,
        "teaches": "labelled true",
    }


def test_one_verdict_shows_its_history_and_what_became_of_it(
    running_gateway: RunningGateway,
) -> None:
    answer = add_answer(running_gateway.database, "anna")
    anna = running_gateway.client(running_gateway.key("anna"))
    _rate(anna, answer, False)
    changed = _rate(anna, answer, True).json()
    dataset = add_dataset(running_gateway.database, running_gateway.gateway.settings.data)

    shown = anna.get(f"/v1/feedback/{changed['id']}").json()

    assert [said["value"] for said in shown["history"]] == [False, True]
    assert [part["id"] for part in shown["became"]["datasets"]] == [dataset.id]
    assert shown["became"]["examples"][0]["kind"] == "labelled"


def test_null_withdraws_and_a_missing_value_is_refused(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    _rate(anna, answer)

    missing = anna.post("/v1/feedback", json={"completion_id": answer, "kind": "rating"})
    withdrawn = _rate(anna, answer, None)

    assert missing.status_code == 400
    assert missing.json()["error"]["param"] == "value"
    assert withdrawn.status_code == 200
    assert (withdrawn.json()["value"], withdrawn.json()["teaches"]) == (None, "nothing")
    assert anna.get("/v1/feedback").json()["data"] == []


def test_delete_withdraws_and_keeps_the_history(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    given = _rate(anna, answer).json()["id"]

    deleted = anna.delete(f"/v1/feedback/{given}").json()

    assert deleted == {"id": given, "object": "feedback.deleted", "deleted": True}
    assert [said["value"] for said in anna.get(f"/v1/feedback/{given}").json()["history"]] == [
        True,
        None,
    ]


def test_the_list_pages_and_filters(sqlite_gateway: RunningGateway) -> None:
    answers = [add_answer(sqlite_gateway.database, "anna", prompt=f"{n}?") for n in range(3)]
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    ids = [_rate(anna, answer).json()["id"] for answer in answers]
    anna.post("/v1/feedback", json={"completion_id": answers[0], "kind": "stars", "value": 4})

    first = anna.get("/v1/feedback", params={"kind": "rating", "limit": 2}).json()
    rest = anna.get(
        "/v1/feedback", params={"kind": "rating", "limit": 2, "after": first["last_id"]}
    ).json()
    of_one = anna.get("/v1/feedback", params={"completion_id": answers[0]}).json()

    assert [row["id"] for row in first["data"] + rest["data"]] == ids[::-1]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert {row["kind"] for row in of_one["data"]} == {"rating", "stars"}


def test_an_application_judges_for_its_end_users(running_gateway: RunningGateway) -> None:
    answer = add_answer(running_gateway.database, "shop", end_user="bea")
    shop = running_gateway.client(running_gateway.key("shop", end_users=True))

    owner = _rate(shop, answer).json()
    other = _rate(shop, answer, False, user="carl").json()

    assert (owner["user"], other["user"]) == ("bea", "carl")
    assert owner["id"] != other["id"]


def test_a_front_end_that_names_people_by_header_is_told_nothing_by_bodies(
    running_gateway: RunningGateway,
) -> None:
    admin = running_gateway.client()
    body = {"user": "webui", "scopes": ["chat", "feedback"], "end_users": True}
    made = admin.post("/admin/keys", json={**body, "header_only": True}).json()
    assert made["header_only"] is True
    bea, carl = (running_gateway.client(made["key"]) for _ in range(2))
    bea.headers["X-OpenWebUI-User-Id"], carl.headers["X-OpenWebUI-User-Id"] = "bea", "carl"
    question = [{"role": "user", "content": "hi"}]
    forged = {"user": "carl", "safety_identifier": "carl", "metadata": {"user_id": "carl"}}
    answer = bea.post(
        "/v1/chat/completions", json={"model": "assistant", "messages": question, **forged}
    ).json()["id"]
    assert _rate(carl, answer).status_code == 404
    assert carl.get(f"/v1/chat/completions/{answer}").status_code == 404
    assert _rate(bea, answer, user="carl").json()["user"] == "bea"
    other = _rate(carl, add_answer(running_gateway.database, "webui", end_user="carl"), user="bea")
    assert other.json()["user"] == "carl"


def test_a_plain_key_cannot_judge_as_somebody_else(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    assert _rate(anna, answer, user="bea").json()["user"] == "anna"


LONG = "word " * 8_000

TEACHINGS: list[tuple[dict[str, Any], str, Any, str]] = [
    ({}, "rating", True, "labelled true"),
    ({"trainable": False}, "rating", True, "nothing: the answer may not be learned from"),
    ({"stored": False}, "rating", True, "nothing: the answer's text was not kept"),
    ({"kind": "task"}, "rating", True, "nothing: the answer is a front end's own, such as a title"),
    ({"status": AnswerStatus.INTERRUPTED}, "rating", True, "nothing: the answer was interrupted"),
    ({}, "stars", 3, "nothing: it says neither what is good nor what is bad"),
    ({}, "correction", "Drops from a cloud, all the way down.", "supervised and preference"),
    ({}, "correction", " Water from the sky.\u200b", "nothing: it is the answer itself"),
    ({}, "correction", "\u200b\u2060", "nothing: it has no text that can be seen"),
    ({}, "correction", LONG, "nothing: the text is longer than 32,000 characters"),
    (
        {"text": "Rain is water that falls from the clouds to the ground in small drops."},
        "correction",
        "Rain is water that falls from the clouds to the ground in small bits.",
        "supervised; no preference: less than 20% of the answer was changed",
    ),
    (
        {"status": AnswerStatus.INTERRUPTED},
        "correction",
        "Water.",
        "supervised; no preference: the answer was interrupted",
    ),
    (
        {"finish_reason": "length"},
        "rating",
        True,
        "nothing: the answer was cut off, and did not end by itself",
    ),
]


def test_what_a_reply_promises_is_what_a_freeze_makes(sqlite_gateway: RunningGateway) -> None:
    """And it says why the rest is not made, with the bound."""
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    database = sqlite_gateway.database
    given = []
    for n, (columns, kind, value, words) in enumerate(TEACHINGS):
        answer = add_answer(
            database, "anna", **{"text": "Water from the sky.", "prompt": f"Rain {n}?", **columns}
        )
        reply = anna.post(
            "/v1/feedback", json={"completion_id": answer, "kind": kind, "value": value}
        )
        assert reply.json()["teaches"] == words, (
            columns,
            value[:40] if kind == "correction" else value,
        )
        given.append((reply.json()["id"], words))
    add_dataset(database, sqlite_gateway.gateway.settings.data)
    for judgement_id, words in given:
        made = [
            part["kind"]
            for part in anna.get(f"/v1/feedback/{judgement_id}").json()["became"]["examples"]
        ]
        promised = words.partition(";")[0].replace("labelled true", "labelled")
        assert made == ([] if words.startswith("nothing") else promised.split(" and ")), words


def test_the_deployments_policy_says_what_is_taught(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    body = {"completion_id": answer, "kind": "stars", "value": 4}
    with sqlite_gateway.database.read() as session:
        person_id = session.get_one(Answer, answer).person_id
    for policy, words in (
        ({"stars_true": 5}, "nothing: it says neither what is good nor what is bad"),
        ({"kinds": ["supervised"]}, "nothing: the deployment's policy makes no such examples"),
        (
            {"excluded_people": [person_id]},
            "nothing: the deployment's policy leaves this person's verdicts out",
        ),
    ):
        with sqlite_gateway.database.write() as session:
            get_deployment(session, "assistant").policies = {"curation": policy}
        assert anna.post("/v1/feedback", json=body).json()["teaches"] == words


def test_what_cannot_be_meant_is_refused_by_name(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"stars": 5}, "stars"),
        ({"value": 1}, "kind 'stars'"),
        ({"value": -1}, "rating takes true or false"),
        ({"kind": "thumb"}, "kind"),
        ({"choice_index": 7}, "choice"),
        ({"choice_index": True}, "choice_index"),
        ({"comment": "a\0b"}, "comment"),
        ({"metadata": {"a\0": "b"}}, "key"),
        ({"source": {"type": "cat"}}, "source"),
        ({"user": "x" * 257}, "user"),
    ]
    for change, names in refused:
        body = {"completion_id": answer, "kind": "rating", "value": True, **change}
        reply = anna.post("/v1/feedback", json=body)
        assert reply.status_code == 400, change
        assert names in reply.json()["error"]["message"]
    assert anna.get("/v1/feedback").json()["data"] == []


def test_an_answer_can_be_judged_while_it_still_streams(
    running_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    gateway_engine.faults = Faults(token_seconds=0.02)
    anna = running_gateway.client(running_gateway.key("anna"))
    asked = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with anna.stream("POST", "/v1/chat/completions", json=asked) as reply:
        lines = reply.iter_lines()
        answer_id = json.loads(next(lines).removeprefix("data: "))["id"]
        with running_gateway.database.read() as session:
            assert session.get_one(Answer, answer_id).status == AnswerStatus.STARTED
        other = _rate(anna, answer_id, choice_index=1)
        given = _rate(anna, answer_id)
        rest = list(lines)
    assert (other.status_code, given.status_code) == (400, 201)
    assert [line for line in rest if line][-1] == "data: [DONE]"

    dataset = add_dataset(running_gateway.database, running_gateway.gateway.settings.data)
    shown = anna.get(f"/v1/feedback/{given.json()['id']}").json()
    assert [part["id"] for part in shown["became"]["datasets"]] == [dataset.id]
    with running_gateway.database.read() as session:
        assert session.get_one(Answer, answer_id).status == AnswerStatus.COMPLETE


# Tokens


def _token(client: httpx.Client, completion_id: str, **more: Any) -> httpx.Response:
    body = {"completion_id": completion_id, "expires_in_seconds": 60, **more}
    return client.post("/v1/feedback/tokens", json=body)


def test_a_token_judges_its_answer_and_reads_its_verdict_and_nothing_else(
    running_gateway: RunningGateway,
) -> None:
    answer, other = (
        add_answer(running_gateway.database, "anna", prompt=prompt) for prompt in ("One?", "Two?")
    )
    anna = running_gateway.client(running_gateway.key("anna", "chat", "feedback", "curate"))
    made = _token(anna, answer)
    assert made.status_code == 201
    assert made.json()["token"].startswith("fbt-burnish-")
    browser = running_gateway.client(made.json()["token"])
    others = _rate(anna, other).json()["id"]

    given = _rate(browser, answer, comment="Right.")
    assert (given.status_code, given.json()["user"]) == (201, "anna")
    assert browser.get(f"/v1/feedback/{given.json()['id']}").json()["comment"] == "Right."
    assert _rate(browser, answer, user="bo").json()["user"] == "anna"
    assert _rate(browser, other).status_code == 403
    assert browser.get(f"/v1/feedback/{others}").status_code == 404
    conversation = {"conversation_id": "conv_1", "kind": "rating", "value": True}
    assert browser.post("/v1/feedback", json=conversation).status_code == 403
    for method, path in (
        ("GET", "/v1/feedback"),
        ("DELETE", f"/v1/feedback/{given.json()['id']}"),
        ("POST", "/v1/feedback/tokens"),
        ("POST", "/v1/comparisons"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/admin/deployments"),
    ):
        assert browser.request(method, path).status_code == 403, path


def test_a_token_of_an_application_is_for_whoever_got_the_answer_or_was_named(
    running_gateway: RunningGateway,
) -> None:
    shop = running_gateway.client(running_gateway.key("shop", "chat", "feedback", end_users=True))
    asked = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "user": "u1"}
    answer = shop.post("/v1/chat/completions", json=asked).json()["id"]
    for more, user in (({}, "u1"), ({"user": "u2"}, "u2")):
        browser = running_gateway.client(_token(shop, answer, **more).json()["token"])
        assert _rate(browser, answer).json()["user"] == user


def test_a_token_ends_with_its_time_and_its_key(running_gateway: RunningGateway) -> None:
    answer = add_answer(running_gateway.database, "anna")
    admin = running_gateway.client()
    keys = [
        admin.post("/admin/keys", json={"user": "anna", "scopes": ["feedback"]}).json()
        for _ in range(2)
    ]
    first, second = (
        running_gateway.client(_token(running_gateway.client(key["key"]), answer).json()["token"])
        for key in keys
    )
    assert (_rate(first, answer).status_code, _rate(second, answer).status_code) == (201, 200)

    with running_gateway.database.write() as session:
        person = session.get_one(Answer, answer).person_id
        past = int((now() - timedelta(seconds=1)).timestamp())
        grant = Grant(answer, person, keys[1]["id"], past)
        expired = sign(grant, running_gateway.gateway.signing.tokens)
    refused = _rate(running_gateway.client(expired), answer)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "token_expired")

    admin.delete(f"/admin/keys/{keys[0]['id']}")
    assert _rate(first, answer).status_code == 401
    assert _rate(second, answer).status_code == 200


@pytest.mark.parametrize("seconds", [0, 2_592_001, 1.5, "60", None])
def test_a_token_without_a_sound_time_is_refused(
    sqlite_gateway: RunningGateway, seconds: object
) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    refused = _token(anna, answer, expires_in_seconds=seconds)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expires_in_seconds")


def test_a_token_is_never_logged(
    sqlite_gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    token = _token(sqlite_gateway.client(sqlite_gateway.key("anna")), answer).json()["token"]
    with caplog.at_level("DEBUG"):
        _rate(sqlite_gateway.client(token), answer)
        _rate(sqlite_gateway.client(token + "x"), answer)
    of_ours = [r for r in caplog.records if r.name.partition(".")[0] in ("server", "uvicorn")]
    assert token not in repr([vars(record) for record in of_ours])


def test_a_curator_judges_and_withdraws_nothing_of_others(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    given = _rate(anna, answer).json()["id"]
    curator = sqlite_gateway.client(sqlite_gateway.key("cu", "feedback", "curate"))

    assert curator.get(f"/v1/feedback/{given}").status_code == 200
    assert _rate(curator, answer).status_code == 404
    assert _token(curator, answer).status_code == 404
    assert curator.delete(f"/v1/feedback/{given}").status_code == 404
    assert anna.get(f"/v1/feedback/{given}").json()["value"] is True


def test_an_administrator_who_withdraws_somebody_elses_verdict_is_written_down(
    sqlite_gateway: RunningGateway,
) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    given = _rate(sqlite_gateway.client(sqlite_gateway.key("anna")), answer).json()["id"]
    admin = sqlite_gateway.client()
    own = _rate(admin, answer).json()["id"]

    for judgement in (given, own):
        assert admin.delete(f"/v1/feedback/{judgement}").status_code == 200

    entries = admin.get("/admin/audit").json()["data"]
    assert [(entry["action"], entry["subject"]) for entry in entries] == [
        ("judgement_withdrawn", given)
    ]


def test_an_application_speaks_for_nobody_but_its_own_end_users(
    sqlite_gateway: RunningGateway,
) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    shop = sqlite_gateway.client(sqlite_gateway.key("shop", "admin", end_users=True))

    assert _rate(shop, answer).json()["user"] == "anonymous"
    browser = sqlite_gateway.client(_token(shop, answer).json()["token"])
    assert _rate(browser, answer).json()["user"] == "anonymous"
