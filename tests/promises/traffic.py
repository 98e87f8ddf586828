"""Callers that ask without pause, and keep what they were answered."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Heard:
    """An answer whose end a client saw."""

    id: str
    release: str
    content: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Refusal:
    """What a client was told instead of an answer's end."""

    status: int  #: 200 where a stream had begun
    error: dict[str, Any]  #: that of OpenAI's envelope


class Refused(ValueError):
    """An error in OpenAI's envelope, as a reply or as the last event of a stream."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status} {body}")
        found = json.loads(body)
        if set(found) != {"error"}:
            raise ValueError(f"no envelope: {body}")
        self.refusal = Refusal(status, found["error"])


@dataclass
class Traffic:
    """Threads that ask gateways in turn, every second time streamed.

    `turns` of a conversation follow each other; the first error ends it. `refusals` are those of
    the `errors` that came as one should.
    """

    urls: Sequence[str]
    key: str
    turns: int = 1
    answers: list[Heard] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @contextmanager
    def running(self, callers: int = 4) -> Iterator[Traffic]:
        """Ask until the block ends, which waits for the answers that have begun."""
        self._stop.clear()
        threads = [threading.Thread(target=self._ask_on, args=(i,)) for i in range(callers)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def wait_for(self, more: int, timeout_seconds: float = 60.0) -> None:
        """Block until so many more answers, or errors, have come."""
        goal = len(self.answers) + len(self.errors) + more
        self.wait_until(lambda: len(self.answers) + len(self.errors) >= goal, timeout_seconds)

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
        """Block until a condition on what has come holds."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_seconds)

    def _ask_on(self, caller: int) -> None:
        url = self.urls[caller % len(self.urls)]
        headers = {"authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
            said: list[dict[str, Any]] = []
            for number in itertools.count():
                if self._stop.is_set():
                    return
                messages = [*said, {"role": "user", "content": f"question {caller}.{number}"}]
                said = []
                try:
                    heard = (_stream if number % 2 else _ask)(client, messages)
                except (httpx.HTTPError, ValueError) as error:
                    self._note(error)
                    if isinstance(error, httpx.TransportError):
                        return  # the gateway is gone
                else:
                    self._note(heard)
                    if len(messages) < 2 * self.turns - 1:
                        said = [*messages, {"role": "assistant", "content": heard.content}]

    def _note(self, came: Heard | Exception) -> None:
        with self._changed:
            if isinstance(came, Heard):
                self.answers.append(came)
            else:
                self.errors.append(f"{type(came).__name__}: {came}")
            if isinstance(came, Refused):
                self.refusals.append(came.refusal)
            self._changed.notify_all()


def _ask(client: httpx.Client, messages: list[dict[str, Any]]) -> Heard:
    reply = client.post(CHAT, json={"model": "assistant", "messages": messages})
    if reply.status_code != 200:
        raise Refused(reply.status_code, reply.text)
    answer = reply.json()
    content = answer["choices"][0]["message"]["content"]
    return Heard(answer["id"], answer["model"], content, messages)


def _stream(client: httpx.Client, messages: list[dict[str, Any]]) -> Heard:
    body = {"model": "assistant", "messages": messages, "stream": True}
    content, names = "", set()
    refused: Refused | None = None
    with client.stream("POST", CHAT, json=body) as reply:
        if reply.status_code != 200:
            raise Refused(reply.status_code, reply.read().decode())
        for line in reply.iter_lines():
            if line and refused is not None:
                raise ValueError(f"the stream goes on after its error: {line}")
            if line == "data: [DONE]":
                (found,) = names
                return Heard(*found, content, messages)
            if line:
                said = line.removeprefix("data: ")
                event = json.loads(said)
                if "error" in event:
                    refused = Refused(reply.status_code, said)
                    continue
                names.add((event["id"], event["model"]))
                content += event["choices"][0]["delta"].get("content") or ""
    raise refused or ValueError("the stream broke off")
