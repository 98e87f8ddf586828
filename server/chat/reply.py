"""What an engine says: put together for the record, and under the public name for the client.

Owns: the split of a stream at event ends, the form of its choices, their text, thoughts and calls,
the name in the bytes. Covered: an engine that writes its JSON in another way, text that looks like
a field, a 200 that holds no completion.
Does not own: what is done with an answer (`relay.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from pydantic_core import from_json

from feedback.db import now
from server.errors import EngineFault

LARGEST_EVENT = 4 * 1024 * 1024
DONE = b"data: [DONE]\n\n"
MOST_FORMS = 8  #: of one stream's events; what has none of them is parsed
_PROBE = b"another text"


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


class Names:
    """Puts the public name in the place of the engine's.

    A quote inside a JSON string is always escaped, so the first match is the field itself.
    """

    def __init__(self, engine_name: str, public_name: str) -> None:
        self._public_name = public_name
        new = json.dumps(public_name, ensure_ascii=False).encode()
        forms = dict.fromkeys(json.dumps(engine_name, ensure_ascii=p) for p in (False, True))
        #: the field as an engine may write it, and as the client gets it
        self._fields = [
            (b'"model":' + space + form.encode(), b'"model":' + space + new)
            for space in (b"", b" ")
            for form in forms
        ]

    def put_into(self, raw: bytes) -> bytes:
        """A whole answer. Raises EngineFault where it is no JSON object."""
        for old, new in self._fields:
            if old in raw:
                return raw.replace(old, new, 1)
        answer = parse(raw)  # an engine that writes its JSON in another way
        answer["model"] = self._public_name
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    def put_into_event(self, event: bytes) -> bytes:
        """An event of a stream."""
        for old, new in self._fields:
            if old in event:
                return event.replace(old, new, 1)
        return b"data: " + self.put_into(event[6:-2]) + b"\n\n"


@lru_cache(maxsize=1024)
def names_of(engine_name: str, public_name: str) -> Names:
    """`Names` of these two."""
    return Names(engine_name, public_name)


class Events:
    """Whole server-sent events out of a stream's pieces; each ends with its blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def split(self, piece: bytes) -> list[bytes]:
        """The events that are whole with this piece. Raises EngineFault where one has no end."""
        rest = self._rest + piece if self._rest else piece
        end = rest.find(b"\n\n")
        if end >= 0 and end == len(rest) - 2:  # most pieces are one event
            self._rest = b""
            return [rest]
        *events, self._rest = rest.split(b"\n\n")
        if len(self._rest) > LARGEST_EVENT:
            raise EngineFault(f"an event of the engine passes {LARGEST_EVENT} bytes")
        return [event + b"\n\n" for event in events]


@dataclass(frozen=True, slots=True)
class _Form:
    """The bytes around the text of events that are alike except for their text.

    Before and after it, as the engine writes them and (`renamed_…`) as the client gets them.
    """

    before: bytes
    after: bytes
    renamed_before: bytes
    renamed_after: bytes
    pieces: list[str]  #: where the text goes


class Forms:
    """Recognises a stream's events by their form, so that most of them need no JSON parsing.

    Nearly all events of a stream are alike but for the next token; taking that out of the bytes
    costs a quarter of parsing them.
    """

    def __init__(self, heard: Heard, names: Names) -> None:
        self._heard = heard
        self._names = names
        self._forms: list[_Form] = []

    def hear(self, event: bytes) -> bytes | None:
        """Take the text of an event that has a known form; what the client gets of it.

        None: the event has to be parsed.
        """
        for form in self._forms:
            if event.startswith(form.before) and event.endswith(form.after):
                raw = event[len(form.before) : -len(form.after)]
                try:
                    text = from_json(b'"%b"' % raw)
                except ValueError:  # it does not end where the form says
                    return None
                if not text:
                    return None
                form.pieces.append(text)
                return form.renamed_before + raw + form.renamed_after
        return None

    def learn(self, event: bytes, found: dict[str, Any]) -> None:
        """Remember the form of an event that was parsed to `found`, and heard, if it has one."""
        place = self._place_of_text(found) if len(self._forms) < MOST_FORMS else None
        if place is None:
            return
        name, pieces = place
        # A quote inside a JSON string is always escaped, so what is found is a field; that it is
        # the right one is seen by putting another text there.
        at = b'"%b":"%b"' % (name.encode(), pieces[-1].encode())
        if event.count(at) != 1 or any(form.pieces is pieces for form in self._forms):
            return
        other = event.replace(at, b'"%b":"%b"' % (name.encode(), _PROBE))
        renamed = self._names.put_into_event(other)
        if (
            other.count(_PROBE) == renamed.count(_PROBE) == 1
            and _text_of(parse(other[6:]), name) == _PROBE.decode()
        ):
            before, _, after = other.partition(_PROBE)
            renamed_before, _, renamed_after = renamed.partition(_PROBE)
            self._forms.append(_Form(before, after, renamed_before, renamed_after, pieces))

    def _place_of_text(self, event: dict[str, Any]) -> tuple[str, list[str]] | None:
        """The field of an event that brought a piece of text, and the list that the text went to.

        None where the event said something else too.
        """
        choices: list[dict[str, Any]] = event.get("choices") or []
        if len(choices) != 1 or choices[0].get("finish_reason") is not None:
            return None
        choice = choices[0]
        if not self._heard.chat:
            return ("text", self._heard.texts[choice["index"]]) if choice.get("text") else None
        said = [name for name, value in (choice.get("delta") or {}).items() if value]
        if said == ["content"]:
            return "content", self._heard.texts[choice["index"]]
        if said in (["reasoning"], ["reasoning_content"]):
            return said[0], self._heard.reasoning[choice["index"]]
        return None


def _text_of(event: dict[str, Any], name: str) -> Any:
    choice = event["choices"][0]
    return choice.get("text") if name == "text" else choice["delta"].get(name)
