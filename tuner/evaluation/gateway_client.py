"""The worker's way to the gateway: scores, answers, and the evaluation slot.

Owns: the HTTP calls, their retries and what their failures mean. Does not own what is asked
(`measurement.py`) or how the gateway serves it. Scores and greedy answers change nothing, so a call
that broke is simply made again: a gateway that restarts in the middle of an evaluation costs a few
seconds.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

import httpx

from feedback.formats.messages import as_sent

logger = logging.getLogger(__name__)

ITEMS_PER_REQUEST = 16
_MAX_WAIT_SECONDS = 30.0

Message = Mapping[str, Any]


class GatewayError(Exception):
    """The gateway refused; `status` and `code` are its own."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(f"the gateway answered {status}: {message}")
        self.status = status
        self.code = code


class GatewayUnreachable(Exception):
    """No answer from the gateway within the client's patience."""


class SlotLost(Exception):
    """The evaluation slot went to somebody else: what was measured since may be other weights'."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, as far as a chat template sees it."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of one completion under one release, summed over its tokens, in nats."""

    prompt_tokens: int
    completion_tokens: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Unscored:
    """Why an item has no score."""

    error: str


@dataclass(frozen=True, slots=True)
class Slot:
    """The evaluation slot, as the gateway granted it."""

    release: str
    token: str
    expires_in_seconds: float


#: What is sampled is what the model expects: neither a release's settings nor the base's own cut or
#: bend it.
_UNTOUCHED: Final = {
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """An answer as it was generated."""

    text: str
    finish_reason: str | None
    completion_tokens: int


class GatewayClient:
    """Calls of one worker. Safe to use from several threads.

    `patience_seconds` bounds how long one call is tried again while the gateway is away or says
    503; `stopped` is asked between tries and ends them.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        patience_seconds: float = 300.0,
        timeout_seconds: float = 600.0,
        transport: httpx.BaseTransport | None = None,
        stopped: threading.Event | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout_seconds, connect=10.0),
            transport=transport,
            trust_env=False,
        )
        self._base_url = base_url
        self._patience_seconds = patience_seconds
        self._stopped = stopped or threading.Event()
        self._monotonic = monotonic

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back connections."""
        self._http.close()

    def score(self, model: str, items: Sequence[tuple[Asked, Message]]) -> list[Score | Unscored]:
        """Score (prompt, completion message) pairs under a release or the base, in order.

        The prompt's messages are used as given: nothing is put before them.
        """
        scores: list[Score | Unscored] = []
        for start in range(0, len(items), ITEMS_PER_REQUEST):
            batch = [
                {
                    "prompt": list(prompt.messages),
                    "completion": [completion],
                    **({"tools": list(prompt.tools)} if prompt.tools else {}),
                    **(
                        {"template_kwargs": dict(prompt.template_kwargs)}
                        if prompt.template_kwargs
                        else {}
                    ),
                }
                for prompt, completion in items[start : start + ITEMS_PER_REQUEST]
            ]
            reply = self._call("POST", "/internal/score", {"model": model, "items": batch})
            scores += [_read_score(item) for item in reply["items"]]
        return scores

    def score_text(self, model: str, texts: Sequence[str]) -> list[Score | Unscored]:
        """Score plain texts under a release or the base, in order: every token but the first.

        Nothing is put before or behind a text.
        """
        scores: list[Score | Unscored] = []
        for start in range(0, len(texts), ITEMS_PER_REQUEST):
            batch = [{"text": text} for text in texts[start : start + ITEMS_PER_REQUEST]]
            reply = self._call("POST", "/internal/score", {"model": model, "items": batch})
            scores += [_read_score(item) for item in reply["items"]]
        return scores

    def generate(
        self, model: str, prompt: Asked, *, max_tokens: int, temperature: float = 0, seed: int = 0
    ) -> GeneratedAnswer:
        """One answer of a release, greedy unless a temperature is given.

        Tools are shown to it; a call comes as text.
        """
        tools = {"tools": list(prompt.tools), "tool_choice": "none"} if prompt.tools else {}
        reply = self._call(
            "POST",
            "/v1/chat/completions",
            {
                "model": model,
                "messages": as_sent(prompt.messages),
                **tools,
                **_template_settings(prompt.template_kwargs),
                "temperature": temperature,
                **(_UNTOUCHED if temperature else {}),
                "max_tokens": max_tokens,
                "seed": seed,
            },
        )
        choice = reply["choices"][0]
        return GeneratedAnswer(
            text=choice["message"].get("content") or "",
            finish_reason=choice.get("finish_reason"),
            completion_tokens=int((reply.get("usage") or {}).get("completion_tokens") or 0),
        )

    def take_evaluation_slot(self, release: str) -> Slot:
        """Have `release` loaded and proven on the engines; it takes a few seconds.

        The slot expires by itself unless it is kept.
        """
        grant = self._call("POST", "/internal/evaluation-slot", {"release": release})
        return Slot(release, str(grant["token"]), float(grant["expires_in_seconds"]))

    @contextmanager
    def keep_evaluation_slot(self, slot: Slot) -> Iterator[Callable[[], None]]:
        """Keep the slot for as long as the block runs, then give it back.

        Yields a check that raises `SlotLost` when it was taken away.
        """
        release, token, expires = slot.release, slot.token, slot.expires_in_seconds
        ended, lost = threading.Event(), threading.Event()

        def keep() -> None:
            while not ended.wait(expires / 3):
                try:
                    self._call("POST", f"/internal/evaluation-slot/{token}/beat", {})
                except GatewayError as error:
                    logger.warning(
                        "Evaluation slot lost: %s",
                        error,
                        extra={"action": "evaluation_slot_lost", "release": release},
                    )
                    lost.set()
                    return
                except (GatewayUnreachable, httpx.HTTPError, RuntimeError) as error:
                    # RuntimeError: the client was closed because the worker is shutting down.
                    logger.warning(
                        "Evaluation slot not kept: %s",
                        error,
                        extra={"action": "evaluation_slot_beat_failed", "release": release},
                    )

        def check() -> None:
            if lost.is_set():
                raise SlotLost(
                    f"the evaluation slot of {release!r} was taken away; evaluate it again"
                )

        keeper = threading.Thread(target=keep, name="evaluation-slot", daemon=True)
        keeper.start()
        try:
            yield check
        finally:
            ended.set()
            try:
                self._http.delete(f"/internal/evaluation-slot/{token}", timeout=10.0)
            except (httpx.HTTPError, RuntimeError):
                logger.warning(
                    "Evaluation slot not given back; it expires by itself",
                    extra={"action": "evaluation_slot_left", "release": release},
                )

    def _call(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send, and try again while the gateway is away or answers 503."""
        until = self._monotonic() + self._patience_seconds
        pause = 0.25
        while True:
            try:
                reply = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                wait = pause
            else:
                if reply.status_code != 503:
                    return _read_reply(reply)
                problem = _error_of(reply)[1]
                wait = _retry_after(reply, pause)
            if self._stopped.is_set() or self._monotonic() + wait > until:
                raise GatewayUnreachable(
                    f"the gateway at {self._base_url} gave no answer to {method} {path} within "
                    f"{self._patience_seconds:g} s; the last problem: {problem}"
                )
            self._stopped.wait(wait)
            pause = min(pause * 2, _MAX_WAIT_SECONDS)


def _template_settings(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that give the template these variables.

    `reasoning_effort` has a field of its own, and engines set `enable_thinking` by it.
    """
    others = dict(variables)
    effort = others.pop("reasoning_effort", None)
    if effort is not None and others.get("enable_thinking") is (effort != "none"):
        del others["enable_thinking"]
    return {
        **({} if effort is None else {"reasoning_effort": effort}),
        **({"chat_template_kwargs": others} if others else {}),
    }


def _read_reply(reply: httpx.Response) -> dict[str, Any]:
    if reply.is_success:
        try:
            parsed: dict[str, Any] = reply.json()
            return parsed
        except ValueError:
            raise GatewayError(reply.status_code, None, _describe_other(reply)) from None
    code, message = _error_of(reply)
    raise GatewayError(reply.status_code, code, message)


def _error_of(reply: httpx.Response) -> tuple[str | None, str]:
    try:
        error = reply.json()["error"]
        return error.get("code"), str(error["message"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None, _describe_other(reply)


def _describe_other(reply: httpx.Response) -> str:
    """Size and type of a reply that is no gateway's: its text may be an answer's."""
    kind = reply.headers.get("content-type", "no type")
    return f"no JSON of a gateway: {len(reply.content)} bytes of {kind[:100]}"


def _retry_after(reply: httpx.Response, otherwise: float) -> float:
    try:
        return min(max(float(reply.headers["retry-after"]), 0.0), _MAX_WAIT_SECONDS)
    except (KeyError, ValueError):
        return otherwise


def _read_score(item: Mapping[str, Any]) -> Score | Unscored:
    if "error" in item:
        return Unscored(str(item["error"]))
    logprob = float(item["logprob"])
    if not math.isfinite(logprob):
        return Unscored(f"log-probability {logprob} isn't finite")
    return Score(int(item["prompt_tokens"]), int(item["completion_tokens"]), logprob)
