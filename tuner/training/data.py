"""From JSON Lines to token ids: what each row teaches, rendered exactly as it will be served.

Owns: the two dialects (TRL's conversational rows, OpenAI's fine-tuning rows), rendering with the
base's chat template, the reasons for which an example is dropped, and the validation slice. Does
not own: which judgements became rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from feedback.answers import root_hash
from feedback.curation.extract import build_near_hash, build_prompt_hash
from feedback.formats.messages import as_sent
from feedback.formats.shapes import Kind
from tuner.chat_template import (
    PLAIN,
    AnswerRewritten,
    ChatTemplate,
    TemplateRefused,
    until_end_of_turn,
    without_end,
)
from tuner.control_tokens import ControlTokens
from tuner.crashes import describe_crash

Message = Mapping[str, Any]


WHAT_TO_DO: Mapping[str, str] = {
    "other_kind": "choose the method that fits these examples",
    "template_mismatch": "they were served with another chat template; collect new ones",
    "template_refused": "the base's chat template takes no such conversation; change its messages",
    "answer_rewritten": "the base's chat template cuts or moves such answers; give them without "
    "thoughts",
    "too_long": "raise max_length",
    "empty": "their answers have no text",
    "near_validation": "the validation file has their like; give others",
}
"""Every reason for which a row is dropped, and the advice that goes with it."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names file, line and reason."""


class Tokenizer(Protocol):
    """What rendering needs of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text's token ids."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, read and checked, not yet rendered."""

    id: str
    kind: Kind
    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]  #: of a preference: chosen, rejected
    weight: float = 1.0
    tools: tuple[Any, ...] | None = None
    prompt_tokens: int | None = None  #: length of the rendered prompt when it was served
    #: what the template was given with it when it was served, as `enable_thinking`
    variables: Mapping[str, Any] = field(default_factory=dict)
    served_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One rendered example: token ids, ready for the model."""

    id: str
    kind: Kind
    prompt: tuple[int, ...]
    #: each ends with the end-of-turn token, unless the answer was cut off
    completions: tuple[tuple[int, ...], ...]
    weight: float
    #: hash of the first user turn, hex; examples of one group stay on one side of the validation
    #: split
    group: str

    @property
    def tokens(self) -> int:
        """Prompt and completions together."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def content_hash(self) -> str:
        """Hash (hex) of the token ids."""
        return hashlib.sha256(json.dumps([self.prompt, self.completions]).encode()).hexdigest()


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


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a set of rows became."""

    examples: tuple[RenderedExample, ...]
    drops: Mapping[str, int]  #: reason to count


class Renderer:
    """Turns rows into token ids with the base's own chat template, in its non-thinking form.

    People's text is defused on the way, as it is when served.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_token_ids: Sequence[int],
        *,
        template: ChatTemplate,
        control_tokens: ControlTokens,
        max_length: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._ends = tuple(end_token_ids)
        self._template = template
        self._control_tokens = control_tokens
        self._max_length = max_length
        self.longest_tokens = 0  #: of all rows that were rendered, dropped ones too

    def render(self, rows: Sequence[Row], kinds: Collection[Kind]) -> Rendered:
        """Render the rows of the given kinds, and count all others by the reason they are dropped.

        Reasons: `other_kind`, `template_mismatch` (the prompt is not what it was when served),
        `template_refused` (the template takes no such conversation), `answer_rewritten` (it writes
        the answer otherwise than it was given), `too_long`, `empty`.
        """
        examples: list[RenderedExample] = []
        drops: Counter[str] = Counter()
        for row in rows:
            example = self._render_row(row) if row.kind in kinds else "other_kind"
            if isinstance(example, str):
                drops[example] += 1
            else:
                examples.append(example)
        return Rendered(tuple(examples), dict(sorted(drops.items())))

    def render_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        variables: Mapping[str, Any] = PLAIN,
        at: datetime | None = None,
    ) -> tuple[int, ...]:
        """Token ids that the engine would be given before it answers."""
        return self._encode(
            self._template.render(
                self._prepare(messages),
                self._control_tokens.defuse_tools(tools),
                add_generation_prompt=True,
                variables=variables,
                at=at,
            )
        )

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        return self._control_tokens.defuse(as_sent(messages))

    def _encode(self, text: str) -> tuple[int, ...]:
        # The template writes what begins a text itself, as for an engine.
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _render_row(self, row: Row) -> RenderedExample | str:
        try:
            return self._render_turns(row)
        except TemplateRefused:
            return "template_refused"
        except AnswerRewritten:
            return "answer_rewritten"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # From here on there are token ids alone: no later error can repeat a text.
            raise DataError(f"a row can't be rendered ({describe_crash(error)})") from None

    def _render_turns(self, row: Row) -> RenderedExample | str:
        if row.prompt_tokens is not None:
            served = self.render_prompt(
                row.prompt, row.tools, variables=row.variables, at=row.served_at
            )
            if row.prompt_tokens != len(served):
                return "template_mismatch"
        rendered = [self._render_answer(row, messages) for messages in row.completions]
        prompt = rendered[0][0]
        if any(len(completion) < 2 for _, completion in rendered):
            return "empty"
        completions = tuple(
            without_end(completion) if messages[-1].get("cut_off") else completion
            for (_, completion), messages in zip(rendered, row.completions, strict=True)
        )
        length = len(prompt) + max(map(len, completions))
        self.longest_tokens = max(self.longest_tokens, length)
        if length > self._max_length:
            return "too_long"
        return RenderedExample(
            row.id, row.kind, prompt, completions, row.weight, group_of(row.prompt)
        )

    def _render_answer(
        self, row: Row, messages: Sequence[Message]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the prompt and of the answer."""
        asked, answered = self._template.render_answer(
            self._prepare(row.prompt),
            self._prepare(messages)[-1],
            self._control_tokens.defuse_tools(row.tools),
            variables=row.variables,
            at=row.served_at,
        )
        prompt, whole = self._encode(asked), self._encode(asked + answered)
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            # A token reaches over the border. An engine is given the prompt alone.
            answer = self._encode(answered)
        return prompt, until_end_of_turn(answer, self._ends)


def group_of(prompt: Sequence[Message]) -> str:
    """Names what a row begins with, as the record does: its first user turn (`root_hash`).

    The whole prompt where there is none. 32 hex digits.
    """
    has_user = any(message["role"] == "user" for message in prompt)
    return root_hash(prompt) if has_user else build_prompt_hash(prompt)


def leave_out_near(rows: Sequence[Row], validation: Sequence[Row]) -> list[Row]:
    """`rows` that may train beside a file of `validation` rows, which never do.

    What goes begins with the same user turn as one of these, as the parts of a conversation do, or
    has the words of its prompt: what curation takes for near.
    """
    groups = {group_of(row.prompt) for row in validation}
    words = {build_near_hash(row.prompt) for row in validation}
    return [
        row
        for row in rows
        if group_of(row.prompt) not in groups and build_near_hash(row.prompt) not in words
    ]


def split_validation(
    examples: Sequence[RenderedExample], *, share: float, minimum: int
) -> tuple[list[RenderedExample], list[RenderedExample]]:
    """Split the examples into training and validation, in that order.

    Validation is `share` of the groups, chosen by their hash alone. With fewer than `minimum` of
    them, or nothing left to train on, everything trains and validation is empty.
    """
    held = [example for example in examples if int(example.group[:8], 16) < share * 2**32]
    if len(held) < minimum or len(held) == len(examples):
        return list(examples), []
    return [example for example in examples if int(example.group[:8], 16) >= share * 2**32], held
