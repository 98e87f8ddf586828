"""JSON, JSON Lines and a JSON array, read with an end to everything that could grow.

Owns: what counts as JSON here (no NaN, no key twice, limited depth and digits), and the readers of
lines and of an array. Memory is bounded by the longest record. Does not own: what a record says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO, NoReturn

from feedback.formats.foreign import describe_not_utf8
from feedback.formats.records import Limits, Record, Unreadable, describe_too_long, find_twice

MAX_DEPTH = 64
BOM = b"\xef\xbb\xbf"

_SPACE = re.compile(r"[ \t\r\n]*")
_MOST_DIGITS = 4300  #: of a whole number, as Python reads it; the work grows with their square
_ROWS_BELOW_A_KEY = re.compile(rb'\s*\{\s*"([^"\\]{1,40})"\s*:\s*\[')


def parse_json(text: str) -> Any:
    """`text` as JSON. Raises ValueError, also for NaN and for a key that stands twice."""
    try:
        return _decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(_describe(error)) from None


def _decode(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(_describe(error)) from None


def _describe(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return f"it is nested deeper than {MAX_DEPTH} levels"
    if "integer string conversion" in str(error):
        return f"it has a number with more than {_MOST_DIGITS} digits, which is the limit"
    return str(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = find_twice([name for name, _ in pairs]) or ""
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)


def read_lines(file: BinaryIO, limits: Limits) -> Iterator[tuple[int, str]]:
    """Number and text of every line. Raises `Unreadable` for one that is too long or not UTF-8.

    Lines end with LF alone: U+2028 and its like are letters of a text.
    """
    number = 0
    while line := file.readline(limits.row_bytes + 1):
        number += 1
        if len(line) > limits.row_bytes:
            raise Unreadable(f"line {number}", describe_too_long(limits))
        try:
            yield number, line.removeprefix(BOM if number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            raise Unreadable(f"line {number}", describe_not_utf8(error)) from None


def read_json_lines(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    """One object on each line that isn't blank.

    What is wrong with the file as a whole is said once (`Unreadable`), not for each of its lines.
    """
    is_first = True
    lines: Iterator[tuple[int, str]] = (
        (number, text) for number, line in read_lines(file, limits) if (text := line.strip())
    )
    while (entry := next(lines, None)) is not None:
        number, text = entry
        place = f"line {number}"
        try:
            yield build_record(place, _decode(text))
        except json.JSONDecodeError as error:
            _refuse_other_layouts(place, text, error)
            if is_first and error.pos >= len(text):
                following = next(lines, None)
                goes_on = text[-1] in "{[," or not (following or (0, "{"))[1].startswith("{")
                if following is not None and goes_on:
                    raise Unreadable(place, _describe_spread_object(file)) from None
                lines = chain([following] if following else [], lines)
            yield Record(place, {}, _describe(error))
        except ValueError as error:
            yield Record(place, {}, str(error))
        is_first = False


def _refuse_other_layouts(place: str, text: str, error: json.JSONDecodeError) -> None:
    """Raise `Unreadable` for rows with something between them."""
    behind = text[error.pos : error.pos + 1] if error.msg == "Extra data" else ""
    if behind == "," or text.startswith(","):
        raise Unreadable(
            place,
            "a comma stands between the rows; in JSON Lines nothing does. Leave the commas out, or "
            "put [ before the first row and ] behind the last one",
        )
    if behind == "{":
        raise Unreadable(place, "a second object stands on the line; put each on a line of its own")


def _describe_spread_object(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(4096).removeprefix(BOM)
    below = _ROWS_BELOW_A_KEY.match(head)
    name = below[1].decode(errors="replace") if below else ""
    if below and name not in ("messages", "conversations", "prompt", "chosen", "history"):
        return describe_rows_below(name)
    return (
        "an object goes on over several lines; expected one object on each line, or an array of "
        "objects: put [ before the first and ] behind the last, with commas between"
    )


def describe_rows_below(key: str) -> str:
    """What to do about a file that is one object with its rows inside."""
    return f"its rows lie below the key {key[:40]!r}; upload that array alone, from its [ to its ]"


def build_record(place: str, value: Any) -> Record:
    """The record, or why it is none."""
    if isinstance(value, dict):
        return Record(place, value)
    return Record(place, {}, f"found {_name(value)}, expected an object")


def _name(value: Any) -> str:
    names = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_json_array(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    """The elements of an array, one at a time."""
    source = _ArraySource(file, limits)
    source.skip_space()
    source.take("[")
    row = 0
    while source.skip_space() != "]":
        if row:
            source.take(",")
            if source.skip_space() == "]":
                raise Unreadable(
                    f"line {source.line}", "a comma stands before the array's end; leave it out"
                )
        row += 1
        place = f"line {source.line} (row {row})"
        yield build_record(place, source.take_value(place))
    source.take("]")
    if source.skip_space():
        raise Unreadable(f"line {source.line}", "something stands behind the array's end")


class _ArraySource:
    """A window on the text of a JSON array that holds about one element."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._held = b""  # the first bytes of a character whose last ones are still to be read
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1
        self._read(len(BOM))
        self._text = self._text.removeprefix("\ufeff")

    def skip_space(self) -> str:
        """Pass over white space; the character behind it, or the empty string at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None  # it matches nothing, too
            self._pass(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read(65_536)

    def take(self, sign: str) -> None:
        found = self._text[self._at : self._at + 1]
        if found != sign:
            what = repr(found) if found else "the file's end"
            raise Unreadable(f"line {self.line}", f"not JSON: found {what}, expected {sign!r}")
        self._pass(self._at + 1)

    def take_value(self, place: str) -> Any:
        """The JSON value that begins here. Raises `Unreadable`."""
        wanted = 65_536
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # A number may go on behind the window.
                if end < len(self._text) or self._ended:
                    self._pass(end)
                    return value
            except json.JSONDecodeError as error:
                if self._ended or self._is_wrong(error):
                    line = self.line + self._text.count("\n", self._at, error.pos)
                    raise Unreadable(place, f"not JSON: {error.msg} on line {line}") from None
            except (ValueError, RecursionError) as error:
                raise Unreadable(place, _describe(error)) from None
            if len(self._text) - self._at > self._limits.row_bytes:
                raise Unreadable(place, describe_too_long(self._limits))
            self._read(wanted)
            wanted *= 2  # so that a long element is begun anew few times

    def _is_wrong(self, error: json.JSONDecodeError) -> bool:
        """Whether more text would not mend it: the fault lies before what the window cut off."""
        cut_off = len("-Infinity") + 1  # the longest literal; a string has no longest
        unfinished = error.msg.startswith("Unterminated string")
        return not unfinished and error.pos < len(self._text) - cut_off

    def _pass(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, size: int) -> None:
        raw = self._held + (piece := self._file.read(size))
        self._ended = not piece
        try:
            more, self._held = raw.decode(), b""
        except UnicodeDecodeError as error:
            if self._ended or error.end < len(raw) or len(raw) - error.start > 3:
                raise Unreadable(f"line {self.line} or below", describe_not_utf8(error)) from None
            more, self._held = raw[: error.start].decode(), raw[error.start :]
        self._text = self._text[self._at :] + more
        self._at = 0
