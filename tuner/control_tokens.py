"""Control tokens, and how people's text is kept from becoming one.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands, in what a person wrote too.
So each such text gets a space behind its first character (`< |im_end|>`) before a template sees it,
by this one function in serving, in training and in evaluation; the record keeps what was sent.
Decision 0013 says why it is done here, and so. Imports no torch. Does not own: which messages are
rendered, or how (`chat_template.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from feedback.formats.messages import parse_arguments

Message = Mapping[str, Any]

_ROUNDS = 8  #: of inserting spaces; more than one only where tokens overlap

# Turns that a template marks by text which is no token of its own: `<|user|>`, `[INST]`, `<<SYS>>`.
_MARKS = re.compile(r"<[|｜][^<>|｜\s]{1,48}[|｜]>|\[/?[A-Z_]{3,32}\]|<</?[A-Z]{2,16}>>")


@dataclass(frozen=True)
class ControlTokens:
    """Texts that steer a model, of one base.

    `everywhere`: special tokens and the template's own marks, which nobody writes. `markup`:
    further tokens that the template writes (`<think>`, `<tool_call>`). The answers of a model have
    them, and whoever writes a system prompt may want them; users and tools may not write them.
    """

    everywhere: tuple[str, ...] = ()
    markup: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, special: Iterable[str], other: Iterable[str], templates: Iterable[str]
    ) -> ControlTokens:
        """Those of a tokenizer with these special and other added tokens, and these templates."""
        text = "\n".join(templates)
        everywhere = {*special, *_MARKS.findall(text)}
        markup = {token for token in other if token in text} - everywhere
        return cls(_breakable(everywhere), _breakable(markup))

    def may_be_in(self, body: bytes) -> bool:
        """Whether a request's JSON may hold one; quick, for every request.

        True also for a text in a text with escapes, such as a tool call's arguments, which may
        hide one.
        """
        # A single byte is found by far the fastest, and most text has no `<`.
        if not any(begin in body for begin in self._first):
            return False
        if not any(begin in body for begin in self._begins):
            return False
        return self._in_json.search(body) is not None

    def defuse(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, without control tokens in what they say; others stay the same objects."""
        return [self._message(message) for message in messages]

    def defuse_tools(self, tools: Sequence[Any] | None) -> list[Any] | None:
        """The tools, without control tokens in their names and descriptions."""
        return None if tools is None else [_map(self._all, tool) for tool in tools]

    def _message(self, message: Message) -> Message:
        by_person = message.get("role") not in ("system", "developer", "assistant")
        pattern = self._all if by_person else self._steering
        made: dict[str, Any] = {}
        for key, value in message.items():
            if key == "tool_calls" and isinstance(value, list):
                made[key] = [self._call(call) for call in value]
            else:
                made[key] = value if key == "role" else _map(pattern, value)
        return message if made == message else made

    def _call(self, call: Any) -> Any:
        """Arguments are read before a template sees them, so escapes in them hide nothing."""
        function = dict(call["function"])
        arguments = function.pop("arguments", None)
        said = parse_arguments(arguments)
        made = _map(self._all, said)
        if made != said:
            arguments = (
                made if isinstance(arguments, dict) else json.dumps(made, ensure_ascii=False)
            )
        rest = {key: value for key, value in call.items() if key != "function"}
        return {
            **_map(self._all, rest),
            "function": {**_map(self._all, function), "arguments": arguments},
        }

    @cached_property
    def _steering(self) -> re.Pattern[str] | None:
        return _pattern(self.everywhere)

    @cached_property
    def _all(self) -> re.Pattern[str] | None:
        return _pattern((*self.everywhere, *self.markup))

    @cached_property
    def _first(self) -> tuple[bytes, ...]:
        return tuple(sorted({b"<" if begin[:1] == b"<" else begin for begin in self._begins}))

    @cached_property
    def _begins(self) -> tuple[bytes, ...]:
        if not self.everywhere and not self.markup:
            return ()
        begins = {
            spelling
            for token in (*self.everywhere, *self.markup)
            for spelling in _in_json(token[:2])
        }
        return (*sorted(begins), *_ESCAPED)

    @cached_property
    def _in_json(self) -> re.Pattern[bytes]:
        tokens = (*self.everywhere, *self.markup)
        texts = {spelling for token in tokens for spelling in _in_json(token)}
        return re.compile(b"|".join(map(re.escape, sorted({*texts, *_ESCAPED}))))


_ESCAPED = (b"\\\\u", b"\\\\/")
"""How `\\u003c` and `\\/` look in a JSON text that stands in a JSON text.

JSON's other escapes are the only spellings of their characters beside `\\u`.
"""


def _in_json(text: str) -> tuple[bytes, bytes]:
    """The text in a JSON text, and in a JSON text that stands in one."""
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    return once.encode(), json.dumps(once, ensure_ascii=False)[1:-1].encode()


def _breakable(tokens: Iterable[str]) -> tuple[str, ...]:
    """Without those that no space breaks: a single character, or white space alone."""
    return tuple(sorted(token for token in tokens if len(token.strip()) > 1))


def _pattern(tokens: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def _map(pattern: re.Pattern[str] | None, value: Any) -> Any:
    """`value` with every text in it, keys included, broken where the pattern matches."""
    if pattern is None:
        return value
    if isinstance(value, str):
        return _break(pattern, value)
    if isinstance(value, dict):
        return {_break(pattern, key): _map(pattern, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map(pattern, inner) for inner in value]
    return value


def _break(pattern: re.Pattern[str], text: str) -> str:
    for _ in range(_ROUNDS):
        broken = pattern.sub(_with_space, text)
        if broken == text:
            break
        text = broken
    return text


def _with_space(found: re.Match[str]) -> str:
    return f"{found[0][0]} {found[0][1:]}"
