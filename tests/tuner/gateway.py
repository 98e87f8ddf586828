"""A gateway of scores and answers that a test chooses, behind `httpx.MockTransport`."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tuner.evaluation.gateway_client import GatewayClient

Logprob = Callable[[str, str], float]
"""(model, completion's text) to nats."""


class FakeGateway:
    """Scores by `logprob`, answers with `text`; counts and keeps what it was asked."""

    def __init__(self, logprob: Logprob | None = None, text: str = "A short answer.") -> None:
        self.logprob = logprob or (lambda model, _: -1.0 if "@" in model else -2.0)
        self.text = text
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.held: list[str] = []
        self.failing: dict[str, httpx.Response] = {}  #: path to the reply that it gets
        self.silent: str | None = None  #: the path that waits for `may_reply`
        self.asked = threading.Event()  #: that path was asked
        self.may_reply = threading.Event()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.calls[path] += 1
        if path == self.silent:
            self.asked.set()
            assert self.may_reply.wait(30)
        if (failing := self.failing.get(path)) is not None:
            return failing
        body = json.loads(request.content or b"{}")
        if path == "/internal/score":
            self.bodies.append(body)
            return httpx.Response(
                200, json={"items": [self._score(body, i) for i in body["items"]]}
            )
        if path == "/v1/chat/completions":
            self.bodies.append(body)
            choice = {"message": {"content": self.text}, "finish_reason": "stop"}
            return httpx.Response(200, json={"choices": [choice]})
        if path == "/internal/evaluation-slot":
            self.held.append(body["release"])
            return httpx.Response(201, json={"token": "t1", "expires_in_seconds": 60})
        return httpx.Response(200, json={})

    def client(self, **options: Any) -> GatewayClient:
        """A client of this gateway."""
        return GatewayClient(
            "http://gateway",
            "secret",
            transport=httpx.MockTransport(self),
            **{"patience_seconds": 1.0, **options},
        )

    def _score(self, body: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
        said = item["text"] if "text" in item else item["completion"][0]["content"]
        logprob = self.logprob(body["model"], said)
        return {"prompt_tokens": 4, "completion_tokens": 2, "logprob": logprob}
