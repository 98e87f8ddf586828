"""What an engine's reply says: its form checked, put together for the record.

Owns: the form of choices, their text, thoughts and calls. Covered: a 200 that holds no completion.
Does not own: how a stream is split and renamed (`stream.py`), what is done with an answer
(`relay.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from feedback.db import now
from server.errors import EngineFault


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object of the engine's. Raises EngineFault."""
    try:
        found = from_json(raw)
    except ValueError:
        raise EngineFault("the engine's answer is not JSON") from None
    if not isinstance(found, dict):
        raise EngineFault("the engine's answer is not a JSON object")
    return found


def usage_of(answer: dict[str, Any]) -> dict[str, Any] | None:
    usage = answer.get("usage")
    return usage if isinstance(usage, dict) else None


def count_in(usage: Mapping[str, Any], name: str) -> int | None:
    """A number of tokens; None for whatever else an engine may say."""
    found = usage.get(name)
    return found if type(found) is int and 0 <= found < 2**31 else None


def choices_of(
    found: dict[str, Any], *, chat: bool, choices: int, whole: bool
) -> list[dict[str, Any]]:
    """The choices of an answer, or of an event of a stream, in the form that all else relies on.

    A whole answer has as many as `choices` says; an event has some of them, or none. Raises
    EngineFault that names what is wrong: a server may answer 200 with anything.
    """
    made = found.get("choices")
    if not isinstance(made, list):
        raise _no_completion(f"its 'choices' are {_kind(made)}, expected a list")
    part = "message" if whole else "delta"
    for choice in made:
        if not isinstance(choice, dict):
            raise _no_completion(f"a choice is {_kind(choice)}, expected an object")
        index = choice.get("index")
        if type(index) is not int or not 0 <= index < choices:
            raise _no_completion(f"a choice's 'index' is not a number below {choices}")
        _check_text(choice, "finish_reason")
        if not chat:
            _check_text(choice, "text")
            continue
        said = choice.get(part)
        if not isinstance(said, dict) and (whole or said is not None):
            raise _no_completion(f"a choice's {part!r} is {_kind(said)}, expected an object")
        if said:
            _check_said(said, whole=whole)
    if whole and sorted(choice["index"] for choice in made) != list(range(choices)):
        raise _no_completion(f"it has {len(made)} choices, {choices} were asked for")
    return made


def _check_said(said: dict[str, Any], *, whole: bool) -> None:
    for name in ("content", "reasoning", "reasoning_content"):
        _check_text(said, name)
    calls = said.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _no_completion("its 'tool_calls' are no list of objects")
    for call in calls:
        _check_text(call, "id")
        if not whole and type(call.get("index", 0)) is not int:
            raise _no_completion("a tool call's 'index' is no number")
        function = call.get("function")
        if not isinstance(function, dict) and (whole or function is not None):
            raise _no_completion(f"a tool call's 'function' is {_kind(function)}")
        for name in ("name", "arguments"):
            _check_text(function or {}, name)


def _check_text(found: dict[str, Any], name: str) -> None:
    value = found.get(name)
    if value is not None and not isinstance(value, str):
        raise _no_completion(f"{name!r} is {_kind(value)}, expected a text")


def _kind(value: Any) -> str:
    """What JSON calls a value of this type."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "missing or null" if value is None else kinds.get(type(value), "a number")


def _no_completion(why: str) -> EngineFault:
    return EngineFault(f"the engine answered 200 with no completion: {why}")


@dataclass(slots=True)
class Heard:
    """What the engine has said so far, put together for the record."""

    chat: bool
    texts: dict[int, list[str]] = field(default_factory=dict)
    reasoning: dict[int, list[str]] = field(default_factory=dict)
    tool_calls: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    finish: dict[int, str | None] = field(default_factory=dict)
    stopped_by: dict[int, str] = field(default_factory=dict)  #: texts of the request's `stop`
    usage: dict[str, Any] | None = None
    first_token_at: datetime | None = None

    def hear(self, choices: list[dict[str, Any]]) -> None:
        """Add one event's choices."""
        for choice in choices:
            index = choice["index"]
            delta = choice.get("delta") or {}
            text = delta.get("content") if self.chat else choice.get("text")
            thought = delta.get("reasoning") or delta.get("reasoning_content")
            if (text or thought or delta.get("tool_calls")) and self.first_token_at is None:
                self.first_token_at = now()
            self.texts.setdefault(index, [])
            if text:
                self.texts[index].append(text)
            if thought:
                self.reasoning.setdefault(index, []).append(thought)
            for call in delta.get("tool_calls") or ():
                self._hear_call(index, call)
            if choice.get("finish_reason") is not None:
                self.finish[index] = choice["finish_reason"]
                self._hear_stop(choice)

    def hear_whole(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take the choices of an answer in one piece; what is recorded of them."""
        recorded = []
        for choice in choices:
            index, finish = choice["index"], choice.get("finish_reason")
            given = choice["message"] if self.chat else {"content": choice.get("text") or ""}
            message = {"role": "assistant", "content": given.get("content")}
            if given.get("tool_calls"):
                message["tool_calls"] = given["tool_calls"]
            thought = given.get("reasoning") or given.get("reasoning_content")
            if thought:
                self.reasoning[index] = [thought]
            self.texts[index] = [message["content"] or ""]
            self.finish[index] = finish
            self._hear_stop(choice)
            recorded.append(self._choice(index, message))
        return recorded

    def _hear_stop(self, choice: dict[str, Any]) -> None:
        # vLLM names the text; a number is a token by which the model itself ended.
        if isinstance(choice.get("stop_reason"), str):
            self.stopped_by[choice["index"]] = choice["stop_reason"]

    def _choice(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        made = {"index": index, "message": message, "finish_reason": self.finish.get(index)}
        if index in self.stopped_by:
            made["stop_reason"] = self.stopped_by[index]
        return made

    def _hear_call(self, index: int, call: dict[str, Any]) -> None:
        calls = self.tool_calls.setdefault(index, {})
        known = calls.setdefault(
            call.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}}
        )
        if call.get("id"):
            known["id"] = call["id"]
        function = call.get("function") or {}
        known["function"]["name"] += function.get("name") or ""
        known["function"]["arguments"] += function.get("arguments") or ""

    def choices(self) -> list[dict[str, Any]]:
        """As OpenAI's choices, partial where the stream broke."""
        made = []
        for index in sorted(self.texts):
            message: dict[str, Any] = {"role": "assistant", "content": "".join(self.texts[index])}
            if index in self.tool_calls:
                message["tool_calls"] = [call for _, call in sorted(self.tool_calls[index].items())]
                message["content"] = message["content"] or None
            made.append(self._choice(index, message))
        return made

    def thoughts(self) -> list[str | None] | None:
        if not self.reasoning:
            return None
        return [
            "".join(self.reasoning[i]) if i in self.reasoning else None for i in sorted(self.texts)
        ]
