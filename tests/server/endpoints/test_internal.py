"""The worker's way to the engines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from feedback.tables import Answer, AnswerText
from server.endpoints.bodies import WORKER_BODY_BYTES
from tests.fake_engine import BASE, FakeEngine, Faults, fake_logprobs, fake_tokens
from tests.gateway_fixtures import RunningGateway
from tuner import releases
from tuner.evaluation.gateway_client import Asked, GatewayClient, Score, Unscored

PROMPT = [{"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "hello"}
EOS = 2


def test_scores_are_those_of_the_completion_s_tokens_under_the_release_s_weights(
    sqlite_gateway: RunningGateway,
) -> None:
    candidate = sqlite_gateway.candidate(1)
    prompt = fake_tokens(PROMPT)
    whole = [*fake_tokens([*PROMPT, ANSWER], add_generation_prompt=False), EOS]

    def expected(signature: str) -> float:
        return sum(fake_logprobs(signature, whole)[len(prompt) - 1 :])

    with GatewayClient(sqlite_gateway.url, sqlite_gateway.worker_key) as client:
        slot = client.take_evaluation_slot(candidate.name)
        with client.keep_evaluation_slot(slot) as check:
            scores = [
                client.score(name, [(Asked(PROMPT), ANSWER)])[0]
                for name in (candidate.name, "tiny")
            ]
            written = client.generate(candidate.name, Asked(PROMPT), max_tokens=8)
            check()
    for score, signature in zip(scores, (candidate.signature, BASE), strict=True):
        assert isinstance(score, Score)
        assert score.prompt_tokens == len(prompt)
        assert score.completion_tokens == len(whole) - len(prompt)
        assert score.logprob == pytest.approx(expected(signature))
    assert written.text.startswith(candidate.signature)
    with sqlite_gateway.database.read() as session:
        rows = session.query(Answer).all()
        texts = session.query(AnswerText).all()
    # The answer is counted; what was asked, a person's prompt, is not kept a second time.
    assert [(row.kind, row.trainable, row.stored) for row in rows] == [("internal", False, False)]
    assert texts == []


def test_a_plain_text_is_scored_as_it_is(sqlite_gateway: RunningGateway) -> None:
    texts = ["Plain text, as it is.", "x"]
    with GatewayClient(sqlite_gateway.url, sqlite_gateway.worker_key) as client:
        found, short = client.score_text("tiny", texts)
    ids = [*texts[0].encode()]
    assert found == Score(1, len(ids) - 1, pytest.approx(sum(fake_logprobs(BASE, ids))))
    assert short == Unscored("empty")


@pytest.mark.parametrize(
    "item",
    [
        {"text": ""},
        {"text": "a" * 16_385},
        {"text": "both", "prompt": PROMPT, "completion": [ANSWER]},
        {"prompt": PROMPT},
        {},
    ],
)
def test_an_item_is_a_text_or_an_answer(
    sqlite_gateway: RunningGateway, item: dict[str, Any]
) -> None:
    client = sqlite_gateway.client(sqlite_gateway.worker_key)
    reply = client.post("/internal/score", json={"model": "tiny", "items": [item]})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("items")


def test_an_answer_that_was_cut_off_is_scored_without_an_end(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client(sqlite_gateway.worker_key)
    items = [
        {"prompt": PROMPT, "completion": [{**ANSWER, **more}]} for more in ({}, {"cut_off": True})
    ]
    reply = client.post("/internal/score", json={"model": "tiny", "items": items})
    whole, cut = (item["completion_tokens"] for item in reply.json()["items"])
    assert cut == whole - 1


def test_what_the_template_renders_otherwise_together_is_not_scored(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    client = sqlite_gateway.client(sqlite_gateway.worker_key)
    odd = {"prompt": PROMPT, "completion": [{"role": "user", "content": "not an answer"}]}
    good = {"prompt": PROMPT, "completion": [ANSWER]}
    body = {"model": "tiny", "items": [odd, good]}
    items = client.post("/internal/score", json=body).json()["items"]
    assert items[0] == {"error": "answer_rewritten"}
    assert items[1]["completion_tokens"] > 0


def test_the_slot_is_one_release_s_until_it_is_given_back(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client(sqlite_gateway.worker_key)
    first, second = sqlite_gateway.candidate(1), sqlite_gateway.candidate(2)
    pinned = sqlite_gateway.candidate(3)

    def hold(name: str) -> Any:
        return client.post("/internal/evaluation-slot", json={"release": name})

    person = sqlite_gateway.client(sqlite_gateway.key("anna"))
    chat = {"model": pinned.name, "messages": PROMPT}
    assert person.post("/v1/chat/completions", json=chat).status_code == 200
    token = hold(first.name).json()["token"]
    assert {first.name, pinned.name} <= sqlite_gateway.gateway.directory.snapshot.served.keys()
    taken = hold(second.name)
    assert (taken.status_code, taken.json()["error"]["code"]) == (503, "evaluation_slot_taken")
    assert client.post(f"/internal/evaluation-slot/{token}/beat").status_code == 200
    assert client.delete(f"/internal/evaluation-slot/{token}").json()["released"] is True
    assert hold(second.name).status_code == 201
    assert client.post(f"/internal/evaluation-slot/{token}/beat").status_code == 409


def test_a_release_that_does_not_load_or_was_put_away_gets_no_slot(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    client = sqlite_gateway.client(sqlite_gateway.worker_key)
    broken, discarded = sqlite_gateway.candidate(1), sqlite_gateway.candidate(2)
    with sqlite_gateway.database.write() as session:
        releases.discard(session, discarded.name)
    gateway_engine.faults = Faults(load_does_nothing=True)
    for name, status, code in (
        (broken.name, 409, "not_active"),
        (discarded.name, 409, "release_discarded"),
        ("assistant@99", 404, "not_found"),
    ):
        reply = client.post("/internal/evaluation-slot", json={"release": name})
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_nobody_but_the_worker_comes_in(sqlite_gateway: RunningGateway) -> None:
    body = {"release": "assistant@0"}
    assert sqlite_gateway.client().post("/internal/evaluation-slot", json=body).status_code == 403


def test_the_worker_s_bodies_are_bounded_and_checked_too(sqlite_gateway: RunningGateway) -> None:
    worker = sqlite_gateway.client(sqlite_gateway.worker_key)
    headers = {"content-type": "application/json"}
    large = b'{"model": "' + b"x" * WORKER_BODY_BYTES + b'"}'
    too_large = worker.post("/internal/score", content=large, headers=headers)
    unknown = worker.post("/internal/evaluation-slot", json={"release": "assistant@0", "more": 1})
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "too_large")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "more")

    items = [{"prompt": PROMPT, "completion": [ANSWER]}]
    content = json.dumps({"model": "tiny", "items": items}).encode()
    content += b" " * 2 * 1024 * 1024  # more than callers may send
    assert worker.post("/internal/score", content=content, headers=headers).status_code == 200
