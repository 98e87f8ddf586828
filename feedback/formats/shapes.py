"""From a record to what it teaches: OpenAI's, TRL's, alpaca's and ShareGPT's form.

Owns: how a form is told by its keys, and the training rows of a record: TRL's conversational
dialect, `prompt` with `completion`, or `chosen` and `rejected`, or `completion` and `label`. Does
not own: how records lie in a file (`containers.py`). Keys of a record that its form does not know
are passed over, since data sets carry scores and sources; in a message they are refused. A record
that fits two forms is read as the one that says what the other says and more, or refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import islice
from typing import Any, Literal

from feedback.canonical import canonical_json
from feedback.formats.json_text import describe_rows_below
from feedback.formats.messages import (
    Fields,
    Message,
    add_system,
    check_answer,
    check_taught,
    find_dialogue,
    find_unstorable,
    read_answer,
    read_list,
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
from feedback.formats.sharegpt import read_conversation, read_turn

Row = dict[str, Any]

Kind = Literal["supervised", "preference", "labelled"]

_COMPARED_ROWS = 64  #: of one record, where two forms fit it

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""As tables write them, whatever their case."""


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
OPTIONAL_KEYS = frozenset({"input", "system", "history", "tools", "weight", "corrects"})
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


_SHARED = frozenset({"system", "tools", "weight"})  # of use in every form
_USED_BESIDE: Mapping[Shape, frozenset[str]] = {
    Shape.OPENAI_PREFERENCE: frozenset({"weight"}),
    Shape.PREFERENCE: _SHARED | {"prompt"},
    Shape.COMPLETION: _SHARED | {"corrects"},
    **dict.fromkeys(
        (Shape.ALPACA, Shape.ALPACA_LABELLED, Shape.ALPACA_PREFERENCE),
        _SHARED | {"input", "history"},
    ),
}


def detect_shape(record: Fields, format: Format | None) -> Shape:
    """The form of a record by its keys, among those of `format` (None: all).

    Raises ValueError for no form, and for two that say different things.
    """
    shapes = tuple(_KEYS) if format is None else _SHAPES_OF[format]
    fitting = [s for s in shapes if all(record.get(key) is not None for key in _KEYS[s])]
    # One whose keys are among another's says less.
    largest = [s for s in fitting if not any(set(_KEYS[s]) < set(_KEYS[t]) for t in fitting)]
    if len(largest) == 1:
        return largest[0]
    if largest:
        return _choose(largest, record)
    found = ", ".join(repr(str(key)[:40]) for key in list(record)[:10]) or "none"
    known = "; ".join(shape.value for shape in shapes)
    below = next((key for key, value in record.items() if _are_rows(value)), None)
    way = "" if below is None else f" ({describe_rows_below(str(below))})"
    raise ValueError(f"its keys are {found}{way}; expected those of {known}")


def find_unused(shape: Shape, columns: Mapping[str, str]) -> str | None:
    """A key that was mapped to a column and says nothing in a form; None where all do."""
    used = _USED_BESIDE.get(shape, _SHARED).union(_KEYS[shape])
    return next((key for key in columns if key not in used), None)


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(item, dict)
            and any(all(key in item for key in keys) for keys in _KEYS.values())
            for item in value[:3]
        )
    )


def _choose(shapes: Sequence[Shape], record: Fields) -> Shape:
    """Of several forms that a record fits, the one whose rows say what all others say."""
    filled = [s for s in shapes if all(record[key] not in ("", [], {}) for key in _KEYS[s])]
    if len(filled) == 1:
        return filled[0]
    candidates = filled or shapes
    with suppress(ValueError):  # one that can't be read says something else, too
        rows = {s: list(islice(build_rows(s, record), _COMPARED_ROWS)) for s in candidates}
        for shape, own in rows.items():
            if all(_says(own, row) for other in rows.values() if other is not own for row in other):
                return shape
    names = " and ".join(shape.value for shape in candidates)
    raise ValueError(
        f"it fits {names}, which say different things; name the keys that count with 'columns', "
        "or the form with 'format'"
    )


def _says(own: Sequence[Row], other: Row) -> bool:
    """Whether the rows of one reading hold what a row of another reading teaches."""
    if any(row["id"] == other["id"] for row in own):
        return True
    # The better answer of a pair, and the turns before it.
    said = [*other["prompt"], *other.get("completion", ())]
    return other["kind"] == "supervised" and any(
        row["kind"] == "preference" and [*row["prompt"], *row["chosen"]][: len(said)] == said
        for row in own
    )


def build_rows(shape: Shape, record: Fields) -> Iterator[Row]:
    """The training rows of a record: one, or of a chat one for each answer that is taught.

    Raises ValueError with what was found and what was expected.
    """
    yield from _BUILDERS[shape](record)


def _chat(record: Fields) -> Iterator[Row]:
    """OpenAI's chat teaches every assistant turn that isn't weighted 0."""
    messages = add_system(record, read_messages(record["messages"], "messages"))
    yield from _teach_turns(messages, read_tools(record), read_weight(record))


def _labelled_chat(record: Fields) -> Iterator[Row]:
    messages = add_system(record, read_messages(record["messages"], "messages"))
    yield _label_last(messages, record)


def _openai_preference(record: Fields) -> Iterator[Row]:
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


def _completion(record: Fields) -> Iterator[Row]:
    completion = read_one_answer(
        read_turns(record["completion"], "completion", "assistant"), "completion"
    )
    prompt = add_system(record, read_turns(record["prompt"], "prompt", "user"))
    taught = {"prompt": strip_weights(prompt), "completion": strip_weights([completion])}
    row = _row("supervised", taught, read_tools(record), read_weight(record))
    if record.get("corrects") is not None:
        # As in data sets: it shows what was changed, and isn't part of what the row teaches.
        worse = read_turns(record["corrects"], "corrects", "assistant")
        row["corrects"] = strip_weights([read_one_answer(worse, "corrects")])
        if (reason := find_unstorable(row["corrects"])) is not None:
            raise ValueError(reason)
    yield row


def _labelled(record: Fields) -> Iterator[Row]:
    prompt = add_system(record, read_turns(record["prompt"], "prompt", "user"))
    completion = read_turns(record["completion"], "completion", "assistant")
    yield _label_last([*prompt, read_one_answer(completion, "completion")], record)


def _preference(record: Fields) -> Iterator[Row]:
    """A preference pair with its prompt in a field, or repeated at the start of both answers."""
    chosen, before = split_answer(record["chosen"], "chosen")
    rejected, other = split_answer(record["rejected"], "rejected")
    if before != other:
        raise ValueError("'chosen' and 'rejected' begin differently; they must share their prompt")
    given = record.get("prompt")
    prompt = before if given is None else read_turns(given, "prompt", "user")
    if not prompt:
        reason = "there is no 'prompt', and 'chosen' begins with none"
        if (found := find_dialogue(chosen["content"])) is not None:
            reason += (
                f": it is {found}. Split off the prompt: all turns but the last into 'prompt', as "
                "a list of messages, and the last ones into 'chosen' and 'rejected'"
            )
        raise ValueError(reason)
    if before and prompt != before:
        # A text beside whole conversations is the question that they were collected for.
        if not isinstance(given, str) or given not in [turn["content"] for turn in before]:
            raise ValueError("'prompt' is not what 'chosen' and 'rejected' begin with")
        prompt = before
    yield _pair(
        add_system(record, prompt), chosen, rejected, read_tools(record), read_weight(record)
    )


def _alpaca(record: Fields) -> Iterator[Row]:
    prompt, answer = _alpaca_prompt(record), read_answer(record["output"], "output")
    taught = {"prompt": prompt, "completion": [answer]}
    yield _row("supervised", taught, read_tools(record), read_weight(record))


def _alpaca_labelled(record: Fields) -> Iterator[Row]:
    yield _label_last([*_alpaca_prompt(record), read_answer(record["output"], "output")], record)


def _alpaca_preference(record: Fields) -> Iterator[Row]:
    sides = [read_answer(record[name], name) for name in ("chosen", "rejected")]
    tools, weight = read_tools(record), read_weight(record)
    yield _pair(_alpaca_prompt(record), sides[0], sides[1], tools, weight)


def _alpaca_prompt(record: Fields) -> list[Message]:
    """System, earlier turns (`history`: pairs of texts), and the instruction with its input."""
    turns: list[Message] = []
    history = record.get("history") or []
    if isinstance(history, str):
        history = read_list(history, "history", "pairs") if history.strip(" []") else []
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
    return add_system(record, [*turns, {"role": "user", "content": content}])


def _sharegpt(record: Fields) -> Iterator[Row]:
    yield from _teach_turns(read_conversation(record), read_tools(record), read_weight(record))


def _sharegpt_labelled(record: Fields) -> Iterator[Row]:
    yield _label_last(read_conversation(record), record)


def _sharegpt_preference(record: Fields) -> Iterator[Row]:
    sides = [_sharegpt_answer(record[name], name) for name in ("chosen", "rejected")]
    tools, weight = read_tools(record), read_weight(record)
    yield _pair(read_conversation(record), sides[0], sides[1], tools, weight)


def _sharegpt_answer(given: Any, name: str) -> Message:
    message = read_answer(given, name) if isinstance(given, str) else read_turn(given, name)
    check_answer(message, name)
    return message


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
    plain = strip_weights(messages)
    for index in taught:
        check_answer(messages[index], "messages")
        said = {"prompt": plain[:index], "completion": [plain[index]]}
        yield _row("supervised", said, tools, weight)


def _label_last(messages: Sequence[Message], record: Fields) -> Row:
    """The last turn, good or bad."""
    label = _read_label(record["label"])
    if len(messages) < 2:
        raise ValueError("there is no message before the answer")
    check_answer(messages[-1], "the last message")
    check_taught(messages[-1], "the last message")
    said = {"prompt": strip_weights(messages[:-1]), "completion": strip_weights(messages[-1:])}
    return _row("labelled", said, read_tools(record), read_weight(record), label=label)


def _read_label(given: Any) -> bool:
    """True or false, also as the number or the text that a container makes of it."""
    label = _LABELS.get(given.strip().lower(), given) if isinstance(given, str) else given
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ValueError(f"'label' is {show(given)}; expected true or false, or 1 or 0")
    return bool(label)


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
    return _row("preference", said, tools, weight)


def _row(kind: Kind, said: Row, tools: list[Any] | None, weight: float, **more: Any) -> Row:
    """The row, under the id that an example of a data set that teaches the same has."""
    if not said["prompt"]:
        raise ValueError("there is no message before the answer")
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in said["prompt"]):
        raise ValueError("all messages before the answer are empty")
    if tools:
        said["tools"] = tools
    said |= more
    if (reason := find_unstorable(said)) is not None:
        raise ValueError(reason)
    digest = hashlib.sha256(canonical_json([kind, said]).encode()).hexdigest()
    return {"kind": kind, "id": f"ex_{digest[:32]}", **said, "weight": weight}


_BUILDERS: Mapping[Shape, Callable[[Fields], Iterator[Row]]] = {
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
