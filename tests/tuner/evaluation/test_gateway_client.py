"""Calls to the gateway: what is sent, what is tried again, and what a failure means."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tuner.evaluation.gateway_client import (
    Asked,
    GatewayClient,
    GatewayError,
    GatewayUnreachable,
    GeneratedAnswer,
    Score,
    SlotLost,
    Unscored,
)

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}

Handler = Callable[[httpx.Request], httpx.Response]


def make_client(handler: Handler, **options: Any) -> GatewayClient:
    return GatewayClient(
        "http://gateway",
        "secret",
        transport=httpx.MockTransport(handler),
        **{"patience_seconds": 5.0, **options},
    )


def test_scores_are_asked_in_batches_and_come_back_in_order() -> None:
    asked: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer secret"
        assert request.url.path == "/internal/score"
        body = json.loads(request.content)
        asked.append(body)
        items = [
            {
                "prompt_tokens": 3,
                "completion_tokens": 2,
                "logprob": -float(item["completion"][0]["content"]),
            }
            for item in body["items"]
        ]
        return httpx.Response(200, json={"items": items})

    completions = [{"role": "assistant", "content": str(number)} for number in range(20)]
    with make_client(handler) as client:
        scores = client.score(
            "assistant@1", [(Asked([USER]), completion) for completion in completions]
        )
    assert scores == [Score(3, 2, -float(number)) for number in range(20)]
    assert [len(body["items"]) for body in asked] == [16, 4]
    assert asked[0]["model"] == "assistant@1"
    assert asked[0]["items"][0] == {"prompt": [USER], "completion": [completions[0]]}


def test_an_item_without_a_usable_score_says_why() -> None:
    reply = {
        "items": [
            {"error": "too_long"},
            {"prompt_tokens": 3, "completion_tokens": 2, "logprob": -1e999},
        ]
    }
    handler: Handler = lambda _: httpx.Response(200, content=json.dumps(reply))  # noqa: E731
    with make_client(handler) as client:
        first, second = client.score("tiny", [(Asked([USER]), ANSWER)] * 2)
    assert first == Unscored("too_long")
    assert isinstance(second, Unscored)
    assert "isn't finite" in second.error


def test_an_answer_is_greedy() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 8, "assistant@1")
        choice = {"message": {"content": "Hi"}, "finish_reason": "length"}
        return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 8}})

    with make_client(handler) as client:
        found = client.generate("assistant@1", Asked([USER]), max_tokens=8)
    assert found == GeneratedAnswer("Hi", "length", 8)


@pytest.mark.parametrize(
    "broken",
    [
        httpx.Response(503, headers={"retry-after": "0"}),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
    ],
    ids=["503", "refused", "reset"],
)
def test_a_gateway_that_is_away_for_a_moment_costs_nothing(
    broken: httpx.Response | Exception,
) -> None:
    replies: list[Any] = [broken, httpx.Response(200, json={"items": []})]

    def handler(_: httpx.Request) -> httpx.Response:
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        found: httpx.Response = reply
        return found

    with make_client(handler) as client:
        assert client._call("POST", "/internal/score", {}) == {"items": []}
    assert replies == []


def test_patience_ends() -> None:
    at = iter(range(0, 1000, 4))
    reply = httpx.Response(
        503,
        headers={"retry-after": "0"},
        json={"error": {"message": "the engine starts", "code": "engine_not_ready"}},
    )
    with (
        make_client(lambda _: reply, monotonic=lambda: float(next(at))) as client,
        pytest.raises(GatewayUnreachable, match="within 5 s; the last problem: the engine starts"),
    ):
        client.score("tiny", [(Asked([USER]), ANSWER)])


def test_a_stopped_worker_does_not_try_again() -> None:
    stopped = threading.Event()
    calls = 0

    def handler(_: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        stopped.set()
        raise httpx.ConnectError("refused")

    with make_client(handler, stopped=stopped) as client, pytest.raises(GatewayUnreachable):
        client.score("tiny", [(Asked([USER]), ANSWER)])
    assert calls == 1


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        (
            httpx.Response(404, json={"error": {"message": "no release", "code": "not_found"}}),
            "not_found",
            "answered 404: no release",
        ),
        (httpx.Response(502, html="<html>"), None, "answered 502: .*6 bytes of text/html"),
        (httpx.Response(400, json={"detail": []}), None, "answered 400"),
        (httpx.Response(200, text='{"choices": ['), None, "13 bytes of text/plain"),
    ],
)
def test_a_refusal_is_not_tried_again(reply: httpx.Response, code: str | None, said: str) -> None:
    with make_client(lambda _: reply) as client, pytest.raises(GatewayError, match=said) as error:
        client.score("tiny", [(Asked([USER]), ANSWER)])
    assert (error.value.status, error.value.code) == (reply.status_code, code)


class Slots:
    """The gateway's side of the evaluation slot."""

    def __init__(self, expires_in_seconds: float, beat: httpx.Response) -> None:
        self.calls: list[tuple[str, str]] = []
        self.beaten = threading.Event()
        self._expires = expires_in_seconds
        self._beat = beat

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append((request.method, request.url.path))
        if request.url.path.endswith("/beat"):
            self.beaten.set()
            return self._beat
        return httpx.Response(200, json={"token": "t1", "expires_in_seconds": self._expires})


def test_a_slot_is_kept_while_it_is_held_and_given_back() -> None:
    slots = Slots(0.03, httpx.Response(200, json={}))
    with make_client(slots) as client:
        with client.keep_evaluation_slot(client.take_evaluation_slot("assistant@1")) as check:
            assert slots.beaten.wait(5)
            check()
        assert slots.calls[0] == ("POST", "/internal/evaluation-slot")
        assert ("POST", "/internal/evaluation-slot/t1/beat") in slots.calls
        assert ("DELETE", "/internal/evaluation-slot/t1") in slots.calls


def test_a_slot_that_was_taken_away_is_noticed() -> None:
    slots = Slots(0.03, httpx.Response(404, json={"error": {"message": "gone"}}))
    waiting = threading.Event()

    def hold(client: GatewayClient) -> None:
        with client.keep_evaluation_slot(client.take_evaluation_slot("assistant@1")) as check:
            for _ in range(500):
                check()
                waiting.wait(0.01)

    with make_client(slots) as client, pytest.raises(SlotLost, match="'assistant@1'"):
        hold(client)
    assert slots.calls[-1] == ("DELETE", "/internal/evaluation-slot/t1")
