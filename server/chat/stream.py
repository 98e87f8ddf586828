"""A stream of an engine: split at event ends, heard, and put under the public name.

Owns: the name in the bytes, the forms that spare most events a parser. Covered: an engine that
writes its JSON in another way, text that looks like a field. Does not own: what the events say
(`reply.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic_core import from_json

from server.chat.reply import Heard, parse
from server.errors import EngineFault

LARGEST_EVENT = 4 * 1024 * 1024


DONE = b"data: [DONE]\n\n"


MOST_FORMS = 8  #: of one stream's events; what has none of them is parsed


_PROBE = b"another text"


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
