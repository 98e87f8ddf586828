"""ShareGPT's turns: `from` and `value`, with the calls and results of tools.

Owns: the names of its roles, and OpenAI's form of `function_call` and `observation`. Does not own:
what a conversation teaches (`shapes.py`).
"""

from __future__ import annotations

from typing import Any

from feedback.formats.json_text import parse_json
from feedback.formats.messages import (
    Fields,
    Message,
    add_system,
    read_list,
    read_message,
    read_text,
    show,
)

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_CALL = "function_call"
_RESULTS = ("observation", "tool", "function_response")


def read_conversation(record: Fields) -> list[Message]:
    """The turns of `conversations`, behind the record's `system`."""
    given = read_list(record["conversations"], "conversations", "turns")
    calls = _Calls()
    return add_system(record, [read_turn(turn, "conversations", calls) for turn in given])


class _Calls:
    """The calls of one conversation, numbered; a result belongs to the oldest that has none."""

    def __init__(self) -> None:
        self._begun = 0
        self._answered = 0

    def begin(self) -> str:
        self._begun += 1
        return f"call_{self._begun}"

    def answer(self) -> str | None:
        if self._answered == self._begun:
            return None
        self._answered += 1
        return f"call_{self._answered}"


def read_turn(turn: Any, where: str, calls: _Calls | None = None) -> Message:
    """One turn as OpenAI's message; calls and results where `calls` counts them."""
    if isinstance(turn, dict) and "role" in turn:  # OpenAI's turns under ShareGPT's key
        return read_message(turn, where)
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ValueError(f"{where!r} holds {show(turn)}; expected a turn with 'from' and 'value'")
    speaker = turn["from"] if isinstance(turn["from"], str) else None
    value = read_text(turn["value"], f"{where}.value")
    if calls is not None and speaker == _CALL:
        return _read_calls(value, where, calls)
    if calls is not None and speaker in _RESULTS:
        if (call_id := calls.answer()) is None:
            raise ValueError(f"{where!r} has the turn {speaker!r} without a {_CALL!r} before it")
        return {"role": "tool", "content": value, "tool_call_id": call_id}
    role = _ROLES.get(speaker or "")
    if role is None:
        known = (*_ROLES, _CALL, *_RESULTS)
        raise ValueError(
            f"{where!r} has a turn from {show(turn['from'])}; expected one of {', '.join(known)}"
        )
    return read_message({"role": role, "content": value, "weight": turn.get("weight")}, where)


def _read_calls(value: str, where: str, calls: _Calls) -> Message:
    try:
        found = parse_json(value)
    except ValueError as error:
        raise ValueError(f"{where!r} has a {_CALL!r} that is a text and {error}") from None
    said = []
    for call in found if isinstance(found, list) else [found]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError(
                f"{where!r} has the {_CALL!r} {show(call)}; expected an object with 'name' and "
                "'arguments'"
            )
        function = {"name": call["name"], "arguments": call.get("arguments")}
        said.append({"id": calls.begin(), "type": "function", "function": function})
    return read_message({"role": "assistant", "content": "", "tool_calls": said}, where)
