"""From a record to what it teaches: OpenAI's, TRL's, alpaca's and ShareGPT's form.

Owns: how a form is told by its keys, and the training rows of a record: TRL's conversational
dialect, `prompt` with `completion`, or `chosen` and `rejected`, or `completion` and `label`. Does
not own: how records lie in a file (`containers.py`). Keys of a record that its form does not know
are passed over, since data sets carry scores and sources; in a message they are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

from feedback.curation.examples import ExampleKind
from feedback.db import canonical_json
from feedback.formats.messages import (
    Message,
    check_answer,
    find_unstorable,
    read_answer,
    read_message,
    read_messages,
    read_one_answer,
    read_text,
    read_tools,
    read_turns,
    read_weight,
    show,
    split_answer,
    strip_weights,
)

Record = Mapping[str, Any]
Row = dict[str, Any]

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_LABELS = {"true": True, "1": True, "false": False, "0": False}  #: as CSV writes them


class Format(StrEnum):
    """Who made the form."""

    OPENAI = "openai"
    TRL = "trl"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"


class Shape(StrEnum):
    """One form of a record; its value is the form's name for people."""

    CHAT = "OpenAI's chat (messages)"
    OPENAI_PREFERENCE = "OpenAI's preference (input, preferred_output, non_preferred_output)"
    LABELLED_CHAT = "a labelled chat (messages, label)"
    COMPLETION = "TRL's prompt and completion"
    PREFERENCE = "TRL's preference (prompt, chosen, rejected)"
    LABELLED = "TRL's labelled (prompt, completion, label)"
    ALPACA = "alpaca (instruction, input, output)"
    ALPACA_PREFERENCE = "alpaca's preference (instruction, input, chosen, rejected)"
    ALPACA_LABELLED = "labelled alpaca (instruction, input, output, label)"
    SHAREGPT = "ShareGPT (conversations)"
    SHAREGPT_PREFERENCE = "ShareGPT's preference (conversations, chosen, rejected)"
    SHAREGPT_LABELLED = "labelled ShareGPT (conversations, label)"


_KEYS: Mapping[Shape, tuple[str, ...]] = {
    # Of shapes that share keys, the one with more of them stands first.
    Shape.OPENAI_PREFERENCE: ("input", "preferred_output", "non_preferred_output"),
    Shape.LABELLED_CHAT: ("messages", "label"),
    Shape.CHAT: ("messages",),
    Shape.SHAREGPT_PREFERENCE: ("conversations", "chosen", "rejected"),
    Shape.SHAREGPT_LABELLED: ("conversations", "label"),
    Shape.SHAREGPT: ("conversations",),
    Shape.ALPACA_PREFERENCE: ("instruction", "chosen", "rejected"),
    Shape.ALPACA_LABELLED: ("instruction", "output", "label"),
    Shape.ALPACA: ("instruction", "output"),
    Shape.PREFERENCE: ("chosen", "rejected"),
    Shape.LABELLED: ("prompt", "completion", "label"),
    Shape.COMPLETION: ("prompt", "completion"),
}
OPTIONAL_KEYS = frozenset({"input", "system", "history", "tools", "weight"})
"""Keys that a record may lack; `input` is optional in alpaca."""

KNOWN_KEYS = OPTIONAL_KEYS.union(*_KEYS.values())
"""Every key of a record that means something in one of the forms."""

_SHAPES_OF: Mapping[Format, tuple[Shape, ...]] = {
    Format.OPENAI: (Shape.OPENAI_PREFERENCE, Shape.LABELLED_CHAT, Shape.CHAT),
    Format.TRL: (
        Shape.LABELLED_CHAT,
        Shape.CHAT,
        Shape.PREFERENCE,
        Shape.LABELLED,
        Shape.COMPLETION,
    ),
    Format.ALPACA: (Shape.ALPACA_PREFERENCE, Shape.ALPACA_LABELLED, Shape.ALPACA),
    Format.SHAREGPT: (Shape.SHAREGPT_PREFERENCE, Shape.SHAREGPT_LABELLED, Shape.SHAREGPT),
}


def detect_shape(record: Record, format: Format | None) -> Shape:
    """The form of a record by its keys, among those of `format` (None: all).

    Raises ValueError.
    """
    shapes = tuple(_KEYS) if format is None else _SHAPES_OF[format]
    for shape in shapes:
        if all(record.get(key) is not None for key in _KEYS[shape]):
            return shape
    found = ", ".join(repr(str(key)[:40]) for key in list(record)[:10]) or "none"
    known = "; ".join(shape.value for shape in shapes)
    raise ValueError(f"its keys are {found}; expected those of {known}")


def build_rows(shape: Shape, record: Record) -> Iterator[Row]:
    """The training rows of a record: one, or of a chat one for each answer that is taught.

    Raises ValueError with what was found and what was expected.
    """
    yield from _BUILDERS[shape](record)


def _chat(record: Record) -> Iterator[Row]:
    """OpenAI's chat teaches every assistant turn that isn't weighted 0."""
    messages = read_messages(record["messages"], "messages")
    yield from _teach_turns(messages, read_tools(record), read_weight(record))


def _labelled_chat(record: Record) -> Iterator[Row]:
    messages = read_messages(record["messages"], "messages")
    yield _label_last(messages, record)


def _openai_preference(record: Record) -> Iterator[Row]:
    given = record["input"]
    if not isinstance(given, dict):
        raise ValueError(f"'input' is {show(given)}; expected an object with 'messages'")
    prompt = read_messages(given.get("messages"), "input.messages")
    chosen = read_messages(record["preferred_output"], "preferred_output")
    rejected = read_messages(record["non_preferred_output"], "non_preferred_output")
    yield _pair(
        prompt,
        read_one_answer(chosen, "preferred_output"),
        read_one_answer(rejected, "non_preferred_output"),
        read_tools(given),
        read_weight(record),
    )


def _completion(record: Record) -> Iterator[Row]:
    completion = read_one_answer(
        read_turns(record["completion"], "completion", "assistant"), "completion"
    )
    prompt = read_turns(record["prompt"], "prompt", "user")
    taught = {"prompt": strip_weights(prompt), "completion": [completion]}
    yield _row(ExampleKind.SUPERVISED, taught, read_tools(record), read_weight(record))


def _labelled(record: Record) -> Iterator[Row]:
    prompt = read_turns(record["prompt"], "prompt", "user")
    completion = read_turns(record["completion"], "completion", "assistant")
    yield _label_last([*prompt, read_one_answer(completion, "completion")], record)


def _preference(record: Record) -> Iterator[Row]:
    """With the prompt apart, or within both answers, where it must be the same."""
    chosen, before = split_answer(record["chosen"], "chosen")
    rejected, other = split_answer(record["rejected"], "rejected")
    if before != other:
        raise ValueError("'chosen' and 'rejected' begin differently; they must share their prompt")
    given = record.get("prompt")
    prompt = before if given is None else read_turns(given, "prompt", "user")
    if not prompt:
        raise ValueError("there is no 'prompt', and 'chosen' begins with none")
    if before and prompt != before:
        # A text beside whole conversations is the question that they were collected for.
        if not isinstance(given, str) or given not in [turn["content"] for turn in before]:
            raise ValueError("'prompt' is not what 'chosen' and 'rejected' begin with")
        prompt = before
    yield _pair(prompt, chosen, rejected, read_tools(record), read_weight(record))


def _alpaca(record: Record) -> Iterator[Row]:
    prompt, answer = _alpaca_prompt(record), read_answer(record["output"], "output")
    taught = {"prompt": prompt, "completion": [answer]}
    yield _row(ExampleKind.SUPERVISED, taught, None, read_weight(record))


def _alpaca_labelled(record: Record) -> Iterator[Row]:
    yield _label_last([*_alpaca_prompt(record), read_answer(record["output"], "output")], record)


def _alpaca_preference(record: Record) -> Iterator[Row]:
    sides = [read_answer(record[name], name) for name in ("chosen", "rejected")]
    yield _pair(_alpaca_prompt(record), sides[0], sides[1], None, read_weight(record))


def _alpaca_prompt(record: Record) -> list[Message]:
    """System, earlier turns (`history`: pairs of texts), and the instruction with its input."""
    turns: list[Message] = []
    if record.get("system"):
        turns.append({"role": "system", "content": read_text(record["system"], "system")})
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ValueError("'history' must be a list of pairs [question, answer]")
    for question, answer in history:
        turns.append({"role": "user", "content": read_text(question, "history")})
        turns.append({"role": "assistant", "content": read_text(answer, "history")})
    parts = [
        read_text(record["instruction"], "instruction"),
        read_text(record.get("input") or "", "input"),
    ]
    content = "\n".join(part for part in parts if part.strip())
    if not content:
        raise ValueError("'instruction' and 'input' are empty")
    return [*turns, {"role": "user", "content": content}]


def _sharegpt(record: Record) -> Iterator[Row]:
    yield from _teach_turns(_sharegpt_turns(record), read_tools(record), read_weight(record))


def _sharegpt_labelled(record: Record) -> Iterator[Row]:
    yield _label_last(_sharegpt_turns(record), record)


def _sharegpt_preference(record: Record) -> Iterator[Row]:
    sides = [_sharegpt_turn(record[name], name) for name in ("chosen", "rejected")]
    for name, turn in zip(("chosen", "rejected"), sides, strict=True):
        check_answer(turn, name)
    yield _pair(
        _sharegpt_turns(record), sides[0], sides[1], read_tools(record), read_weight(record)
    )


def _sharegpt_turns(record: Record) -> list[Message]:
    given = record["conversations"]
    if not isinstance(given, list) or not given:
        raise ValueError(f"'conversations' is {show(given)}; expected a list of turns")
    turns = [_sharegpt_turn(turn, "conversations") for turn in given]
    if record.get("system"):
        turns.insert(0, {"role": "system", "content": read_text(record["system"], "system")})
    return turns


def _sharegpt_turn(turn: Any, where: str) -> Message:
    if isinstance(turn, dict) and "role" in turn:  # OpenAI's turns under ShareGPT's key
        return read_message(turn, where)
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ValueError(f"{where!r} holds {show(turn)}; expected a turn with 'from' and 'value'")
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise ValueError(
            f"{where!r} has a turn from {show(turn['from'])}; expected one of "
            f"{', '.join(_SHAREGPT_ROLES)} (conversations with tools: in OpenAI's form)"
        )
    return {"role": role, "content": read_text(turn["value"], f"{where}.value")}


def _teach_turns(
    messages: Sequence[Message], tools: list[Any] | None, weight: float
) -> Iterator[Row]:
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is of the role {messages[-1]['role']!r}; expected the assistant's "
            "answer"
        )
    taught = [
        index for index, message in enumerate(messages)
        if index and message["role"] == "assistant" and message.get("weight", 1)
    ]  # fmt: skip
    if not taught:
        raise ValueError("no assistant message of a weight above 0 follows a prompt")
    for index in taught:
        check_answer(messages[index], "messages")
        said = {
            "prompt": strip_weights(messages[:index]),
            "completion": strip_weights(messages[index : index + 1]),
        }
        yield _row(ExampleKind.SUPERVISED, said, tools, weight)


def _label_last(messages: Sequence[Message], record: Record) -> Row:
    """The last turn, good or bad."""
    label = record["label"]
    if isinstance(label, str):
        label = _LABELS.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise ValueError(f"'label' is {show(label)}; expected true or false")
    if len(messages) < 2:
        raise ValueError("there is no message before the answer")
    check_answer(messages[-1], "the last message")
    said = {"prompt": strip_weights(messages[:-1]), "completion": strip_weights(messages[-1:])}
    return _row(ExampleKind.LABELLED, said, read_tools(record), read_weight(record), label=label)


def _pair(
    prompt: Sequence[Message],
    chosen: Message,
    rejected: Message,
    tools: list[Any] | None,
    weight: float,
) -> Row:
    said = {
        "prompt": strip_weights(prompt),
        "chosen": strip_weights([chosen]),
        "rejected": strip_weights([rejected]),
    }
    if said["chosen"] == said["rejected"]:
        raise ValueError("both answers are the same, so there is nothing to prefer")
    return _row(ExampleKind.PREFERENCE, said, tools, weight)


def _row(kind: ExampleKind, said: Row, tools: list[Any] | None, weight: float, **more: Any) -> Row:
    """The row, under the id that an example of a data set that teaches the same has."""
    if not said["prompt"]:
        raise ValueError("there is no message before the answer")
    if tools:
        said["tools"] = tools
    said |= more
    if (reason := find_unstorable(said)) is not None:
        raise ValueError(reason)
    digest = hashlib.sha256(canonical_json([kind, said]).encode()).hexdigest()
    return {"kind": kind.value, "id": f"ex_{digest[:32]}", **said, "weight": weight}


_BUILDERS: Mapping[Shape, Callable[[Record], Iterator[Row]]] = {
    Shape.CHAT: _chat,
    Shape.LABELLED_CHAT: _labelled_chat,
    Shape.OPENAI_PREFERENCE: _openai_preference,
    Shape.COMPLETION: _completion,
    Shape.PREFERENCE: _preference,
    Shape.LABELLED: _labelled,
    Shape.ALPACA: _alpaca,
    Shape.ALPACA_LABELLED: _alpaca_labelled,
    Shape.ALPACA_PREFERENCE: _alpaca_preference,
    Shape.SHAREGPT: _sharegpt,
    Shape.SHAREGPT_LABELLED: _sharegpt_labelled,
    Shape.SHAREGPT_PREFERENCE: _sharegpt_preference,
}
