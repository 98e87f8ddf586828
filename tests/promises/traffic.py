"""Callers that ask without pause, and keep what they were answered."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
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


@dataclass
class Traffic:
    """Threads that ask gateways in turn, every second time streamed."""

    urls: Sequence[str]
    key: str
    answers: list[Heard] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
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
        with self._changed:
            goal = len(self.answers) + len(self.errors) + more
            assert self._changed.wait_for(
                lambda: len(self.answers) + len(self.errors) >= goal, timeout_seconds
            )

    def _ask_on(self, caller: int) -> None:
        url = self.urls[caller % len(self.urls)]
        headers = {"authorization": f"Bearer {self.key}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client:
            for number in itertools.count():
                if self._stop.is_set():
                    return
                messages = [{"role": "user", "content": f"question {caller}.{number}"}]
                try:
                    heard = (_stream if number % 2 else _ask)(client, messages)
                except (httpx.HTTPError, ValueError) as error:
                    self._note(None, f"{type(error).__name__}: {error}")
                    if isinstance(error, httpx.TransportError):
                        return  # the gateway is gone
                else:
                    self._note(heard, None)

    def _note(self, heard: Heard | None, error: str | None) -> None:
        with self._changed:
            if heard is not None:
                self.answers.append(heard)
            if error is not None:
                self.errors.append(error)
            self._changed.notify_all()


def _ask(client: httpx.Client, messages: list[dict[str, Any]]) -> Heard:
    reply = client.post(CHAT, json={"model": "assistant", "messages": messages})
    if reply.status_code != 200:
        raise ValueError(reply.text)
    answer = reply.json()
    content = answer["choices"][0]["message"]["content"]
    return Heard(answer["id"], answer["model"], content, messages)


def _stream(client: httpx.Client, messages: list[dict[str, Any]]) -> Heard:
    body = {"model": "assistant", "messages": messages, "stream": True}
    content, names = "", set()
    with client.stream("POST", CHAT, json=body) as reply:
        if reply.status_code != 200:
            raise ValueError(reply.read().decode())
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                (found,) = names
                return Heard(*found, content, messages)
            if line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise ValueError(line)
                names.add((event["id"], event["model"]))
                content += event["choices"][0]["delta"].get("content") or ""
    raise ValueError("the stream broke off")
