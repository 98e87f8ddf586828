"""Messages as people hand them in: what is taken, what is refused, and in which words.

Owns: the roles and keys of a message, texts, tools and weights of a record, and what cannot be
stored. Every function raises ValueError with what was found and what was expected; `where` is the
key that the caller knows. Does not own: what a record teaches (`shapes.py`).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

MAX_DEPTH = 64

Message = dict[str, Any]
Record = Mapping[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")


def find_unstorable(value: Any) -> str | None:
    """Why `value` can't be kept as JSON in UTF-8; None where it can."""
    waiting = [(value, 0)]
    while waiting:
        found, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return f"it is nested deeper than {MAX_DEPTH} levels"
        match found:
            case str():
                if "\x00" in found:
                    return "it has a NUL"
                if not found.isascii() and re.search("[\ud800-\udfff]", found):
                    return "it has half of a surrogate pair, which is no character"
            case dict():
                waiting += [(key, depth) for key in found]
                waiting += [(item, depth + 1) for item in found.values()]
            case list():
                waiting += [(item, depth + 1) for item in found]
            case float():
                if not math.isfinite(found):
                    return "it has a number that is not finite"
            case bool() | int() | None:
                pass
            case _:
                return f"it has a value of type {type(found).__name__}, which JSON has not"
    return None


def read_messages(given: Any, where: str) -> list[Message]:
    """A list of messages, at least one."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where!r} is {show(given)}; expected a list of messages")
    return [read_message(message, where) for message in given]


def read_message(given: Any, where: str) -> Message:
    """A message with what is rendered, and its weight."""
    if not isinstance(given, dict) or given.get("role") not in _ROLES:
        raise ValueError(
            f"{where!r} holds {show(given)}; expected a message with a 'role' "
            f"({', '.join(_ROLES)}) and 'content'"
        )
    # Some writers fill every key, others leave out what is empty.
    message = {key: value for key, value in given.items() if value not in (None, [])}
    unknown = sorted(str(key) for key in message.keys() - {*_KEPT, "weight"})
    if unknown:
        raise ValueError(
            f"{where!r} has a message with the key {unknown[0][:100]!r}; expected "
            f"{', '.join(_KEPT)}, weight"
        )
    for key in ("name", "tool_call_id"):
        if key in message:
            read_text(message[key], f"{where}.{key}")
    calls = message.get("tool_calls")
    if calls is not None:
        _check_tool_calls(calls, message["role"], where)
    if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
        raise ValueError(f"{where!r} has a message of weight {show(given['weight'])}; 0 or 1")
    content = given.get("content")
    if content is None and not calls:
        raise ValueError(f"{where!r} has a message of {message['role']!r} without content")
    return {**message, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """The text; of OpenAI's parts, line by line as the engine is served them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        for part in content
    ] if isinstance(content, list) else [None]  # fmt: skip
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where!r} has content other than text: {show(content)}")
    return "\n".join(str(text) for text in texts)


def _check_tool_calls(calls: Any, role: str, where: str) -> None:
    if role != "assistant" or not isinstance(calls, list) or not calls:
        raise ValueError(f"{where!r} has 'tool_calls' that are no list, or not the assistant's")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not isinstance(function, dict):
            raise ValueError(f"{where!r} has the tool call {show(call)} without a function's name")
        if not isinstance(function.get("arguments"), str | dict):
            raise ValueError(f"{where!r} has a tool call whose 'arguments' are no JSON text")


def read_turns(given: Any, where: str, role: str) -> list[Message]:
    """Messages; a plain text is one message of `role`."""
    if not isinstance(given, str):
        return read_messages(given, where)
    if not given.strip():
        raise ValueError(f"{where!r} is empty")
    return [{"role": role, "content": given}]


def split_answer(given: Any, where: str) -> tuple[Message, list[Message]]:
    """The last turn, which must be an answer, and what stands before it."""
    turns = read_turns(given, where, "assistant")
    check_answer(turns[-1], where)
    return turns[-1], turns[:-1]


def read_one_answer(messages: Sequence[Message], where: str) -> Message:
    """The one message that an answer is."""
    if len(messages) != 1:
        roles = [message["role"] for message in messages[:10]]
        raise ValueError(f"{where!r} must be one assistant message, found {roles}")
    check_answer(messages[0], where)
    return messages[0]


def read_answer(given: Any, where: str) -> Message:
    """A text as the assistant's message."""
    message = {"role": "assistant", "content": read_text(given, where)}
    check_answer(message, where)
    return message


def check_answer(message: Message, where: str) -> None:
    """The message is the assistant's and says or calls something."""
    if message["role"] != "assistant":
        raise ValueError(
            f"{where!r} must be one assistant message, found the role {message['role']!r}"
        )
    if not message["content"].strip() and not message.get("tool_calls"):
        raise ValueError(f"{where!r}: the answer is empty")


def strip_weights(messages: Sequence[Message]) -> list[Message]:
    """The messages with what is rendered alone."""
    return [{key: message[key] for key in _KEPT if key in message} for message in messages]


def read_text(given: Any, where: str) -> str:
    """A text, perhaps an empty one."""
    if not isinstance(given, str):
        raise ValueError(f"{where!r} is {show(given)}; expected a text")
    return given


def read_tools(record: Record) -> list[Any] | None:
    """The functions that were offered, as a list or (some data sets) as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except (ValueError, RecursionError):
            raise ValueError("'tools' is a text that is no JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"'tools' is {show(tools)}; expected a list of objects")
    return tools


def read_weight(record: Record) -> float:
    """How much the row counts; 1 by default."""
    weight: Any = record.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, str):
        with suppress(ValueError):
            weight = float(weight or "1")
    if type(weight) not in (int, float) or not 0 < weight < 1e6:
        raise ValueError(f"'weight' is {show(weight)}; expected a number above 0")
    return float(weight)


def show(value: Any) -> str:
    """The beginning of what was found."""
    return reprlib.repr(value)[:100]
