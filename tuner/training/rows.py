"""From JSON Lines to rows: what each line of a file teaches, checked and not yet rendered.

Owns: the two dialects (TRL's conversational rows, OpenAI's fine-tuning rows). Does not own: which
judgements became rows, or how they are rendered (`rendering.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from feedback.answers import root_hash
from feedback.curation.extract import build_prompt_hash
from feedback.formats.shapes import Kind
from tuner.crashes import describe_crash

Message = Mapping[str, Any]


class DataError(ValueError):
    """Data that cannot be trained on; the message names file, line and reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, read and checked, not yet rendered."""

    id: str
    kind: Kind
    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]  #: of a preference: chosen, rejected
    weight: float = 1.0
    label: bool | None = None  #: of a labelled row alone
    corrects: Message | None = None  #: of a supervised row: the answer that it is a better one for
    tools: tuple[Any, ...] | None = None
    prompt_tokens: int | None = None  #: length of the rendered prompt when it was served
    #: what the template was given with it when it was served, as `enable_thinking`
    variables: Mapping[str, Any] = field(default_factory=dict)
    served_at: datetime | None = None


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Read every row of the files, in order. Raises `DataError` naming file, line and reason."""
    rows: list[Row] = []
    for path in paths:
        name = name_of(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(f"{name}: the file is missing") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from None
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.extend(_parse(json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{name}, line {number}: {error}") from None
                except (LookupError, TypeError, AttributeError) as error:
                    why = describe_crash(error)
                    raise DataError(f"{name}, line {number}: no row ({why})") from None
    return rows


def name_of(path: Path) -> str:
    """The file's name for messages: with its folder, the id of the upload or data set."""
    return f"{path.parent.name}/{path.name}"


def _parse(row: Any) -> Iterator[Row]:
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, expected an object")
    row_id = (
        row.get("id")
        or "row_" + hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:24]
    )
    common: dict[str, Any] = {
        "weight": _weight(row),
        "tools": _tools(row),
        "prompt_tokens": _prompt_tokens(row),
        "variables": _variables(row),
        "served_at": _served_at(row),
    }
    if "messages" in row:
        yield from _parse_chat(row_id, _messages(row, "messages"), common)
    elif "input" in row:
        inner = row["input"] if isinstance(row["input"], dict) else {}
        prompt = _messages(inner, "messages")
        pair = (_answer(row, "preferred_output"), _answer(row, "non_preferred_output"))
        common["tools"] = _tools(inner)
        yield Row(row_id, "preference", prompt, pair, **common)
    else:
        kind = row.get("kind") or _kind(row)
        keys: dict[Kind, tuple[str, ...]] = {
            "supervised": ("completion",),
            "preference": ("chosen", "rejected"),
            "labelled": ("completion",),
        }
        if kind not in keys:
            raise ValueError(f"kind is {_describe(kind)}; expected one of {sorted(keys)}")
        answers = tuple(_answer(row, key) for key in keys[kind])
        if kind == "labelled":
            common["label"] = _label(row)
        if kind == "supervised" and row.get("corrects") is not None:
            (common["corrects"],) = _answer(row, "corrects")
        yield Row(row_id, kind, _messages(row, "prompt"), answers, **common)


def _parse_chat(
    row_id: str, messages: tuple[Message, ...], common: dict[str, Any]
) -> Iterator[Row]:
    """OpenAI's chat rows teach every assistant turn, except those with weight 0."""
    turns = [
        index for index, message in enumerate(messages)
        if message["role"] == "assistant" and index and message.get("weight", 1)
    ]  # fmt: skip
    if not turns:
        raise ValueError("no assistant message follows a prompt, so nothing can be learned from it")
    for index in turns:
        name = row_id if len(turns) == 1 else f"{row_id}#{index}"
        yield Row(name, "supervised", messages[:index], (messages[index : index + 1],), **common)


def _kind(row: Mapping[str, Any]) -> Kind | None:
    if "chosen" in row:
        return "preference"
    return "labelled" if "label" in row else "supervised" if "completion" in row else None


def _messages(row: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is {_describe(messages)}; expected a list of messages")
    return tuple(_message(message, key) for message in messages)


def _message(message: Any, key: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"{key!r} holds {_describe(message)}; expected a message with role and content"
        )
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(
        isinstance(part, dict) and isinstance(part.get(part.get("type", "text")), str)
        for part in parts
    ):
        raise ValueError(f"{key!r} holds content other than text")
    if content is None and message["role"] != "assistant":
        raise ValueError(f"{key!r} holds a message without text that is not the assistant's")
    cut_off = message.get("cut_off")
    if not isinstance(cut_off, bool | None):
        raise ValueError(f"'cut_off' is {_describe(cut_off)}; expected true, false or null")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None) or not all(map(_is_call, calls or ())):
        raise ValueError(f"{key!r} holds tool calls that name no function")
    return message


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _answer(row: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    messages = _messages(row, key)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        others = sum(message["role"] != "assistant" for message in messages)
        raise ValueError(
            f"{key!r} must be one assistant message, found {len(messages)} messages, {others} of "
            "them not the assistant's"
        )
    return messages


def _weight(row: Mapping[str, Any]) -> float:
    weight = row.get("weight", 1.0)
    if type(weight) not in (int, float) or not 0 < weight < float("inf"):
        raise ValueError(f"'weight' is {_describe(weight)}; expected a positive number")
    return float(weight)


def _label(row: Mapping[str, Any]) -> bool:
    label = row.get("label")
    if not isinstance(label, bool):
        raise ValueError(f"'label' is {_describe(label)}; expected true or false")
    return label


def _prompt_tokens(row: Mapping[str, Any]) -> int | None:
    tokens = row.get("prompt_tokens")
    if tokens is not None and type(tokens) is not int:
        raise ValueError(f"'prompt_tokens' is {_describe(tokens)}; expected a whole number or null")
    return tokens


def _variables(row: Mapping[str, Any]) -> Mapping[str, Any]:
    variables = row.get("template_kwargs")
    if not isinstance(variables, dict | None):
        raise ValueError(f"'template_kwargs' is {_describe(variables)}; expected an object")
    return variables or {}


def _served_at(row: Mapping[str, Any]) -> datetime | None:
    served_at = row.get("served_at")
    if served_at is None:
        return None
    try:
        # As a template writes it: by the clock of this machine, which is the engine's.
        return datetime.fromisoformat(served_at).astimezone()
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"'served_at' is {_describe(served_at)}; expected a time") from None


def _describe(value: Any) -> str:
    """What a value is, for an error that gets into logs: a text is not repeated, a number is."""
    match value:
        case None | bool() | int() | float():
            return f"{value!r:.40}"
        case str():
            return "another text"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    tools = row.get("tools")
    return tuple(tools) if isinstance(tools, list) and tools else None


def group_of(prompt: Sequence[Message]) -> str:
    """Names what a row begins with, as the record does: its first user turn (`root_hash`).

    The whole prompt where there is none. 32 hex digits.
    """
    has_user = any(message["role"] == "user" for message in prompt)
    return root_hash(prompt) if has_user else build_prompt_hash(prompt)
