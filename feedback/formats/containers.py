"""From bytes to records: JSON Lines, a JSON array, CSV and parquet, one record at a time.

Owns: where a record stands in its file, and every limit on what is read. Does not own: what a
record says (`shapes.py`). Memory is bounded by the longest row, whatever the file holds.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, BinaryIO, NoReturn

from feedback.formats.messages import MAX_DEPTH

ROWS_PER_BATCH = 64  #: of parquet, decoded at once

_BOM = b"\xef\xbb\xbf"
_DELIMITERS = ",\t;"
_SPACE = re.compile(r"[ \t\r\n]*")


class Container(StrEnum):
    """How records lie in a file."""

    JSON_LINES = "jsonl"
    JSON_ARRAY = "json"
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is accepted of one file."""

    bytes: int = 512 * 1024 * 1024  #: of the rows that come of it
    rows: int = 1_000_000
    row_bytes: int = 4 * 1024 * 1024  #: of one record, and of one row that comes of it


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands; `problem` where it could not be read."""

    place: str  #: "line 7", "row 3"
    value: Mapping[str, Any]
    problem: str | None = None


class Unreadable(Exception):
    """Nothing can be read from here on; the message says why."""

    def __init__(self, place: str | None, reason: str) -> None:
        super().__init__(reason)
        self.place = place
        self.reason = reason


def detect_container(file: BinaryIO) -> Container:
    """What the file's first bytes are; it is left at its beginning. Raises `Unreadable` where it
    is empty.
    """
    file.seek(0)
    head = file.read(4096)
    while head and not head.removeprefix(_BOM).strip():  # white space alone
        head = file.read(4096)
    file.seek(0)
    if not head:
        raise Unreadable(None, "the file is empty")
    if head.startswith(b"PAR1"):
        return Container.PARQUET
    first = head.removeprefix(_BOM).lstrip()[:1]
    return {b"{": Container.JSON_LINES, b"[": Container.JSON_ARRAY}.get(first, Container.CSV)


def read_records(file: BinaryIO, container: Container, limits: Limits) -> Iterator[Record]:
    """The file's records in order. Raises `Unreadable`; a record that alone is broken says so."""
    readers: Mapping[Container, Callable[[BinaryIO, Limits], Iterator[Record]]] = {
        Container.JSON_LINES: _read_json_lines,
        Container.JSON_ARRAY: _read_json_array,
        Container.CSV: _read_csv,
        Container.PARQUET: _read_parquet,
    }
    file.seek(0)
    for count, record in enumerate(readers[container](file, limits), 1):
        if count > limits.rows:
            raise Unreadable(record.place, f"the file has more than {limits.rows} rows")
        yield record


def parse_json(text: str) -> Any:
    """`text` as JSON. Raises ValueError, also for NaN and for a key that stands twice."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_twice)


def _lines(file: BinaryIO, limits: Limits) -> Iterator[tuple[int, str]]:
    """Number and text of every line. Raises `Unreadable` for one that is too long or not UTF-8."""
    number = 0
    while line := file.readline(limits.row_bytes + 1):
        number += 1
        if len(line) > limits.row_bytes:
            raise Unreadable(f"line {number}", _too_long(limits))
        try:
            yield number, line.removeprefix(_BOM if number == 1 else b"").decode()
        except UnicodeDecodeError as error:
            raise Unreadable(f"line {number}", _not_utf8(error)) from None


def _read_json_lines(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    for number, line in _lines(file, limits):
        if line.strip():
            yield _record(f"line {number}", line.strip())


def _record(place: str, text: str) -> Record:
    try:
        value = parse_json(text)
    except ValueError as error:
        return Record(place, {}, str(error))
    if not isinstance(value, dict):
        return Record(place, {}, f"found {_name(value)}, expected an object")
    return Record(place, value)


def _read_json_array(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    source = _ArraySource(file, limits)
    source.skip_space()
    source.take("[")
    row = 0
    while source.skip_space() != "]":
        if row:
            source.take(",")
            source.skip_space()
        row += 1
        place = f"line {source.line} (row {row})"
        value = source.take_value(place)
        if isinstance(value, dict):
            yield Record(place, value)
        else:
            yield Record(place, {}, f"found {_name(value)}, expected an object")
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
        self._read(len(_BOM))
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
            except RecursionError:
                raise Unreadable(place, f"it is nested deeper than {MAX_DEPTH} levels") from None
            except ValueError as error:
                raise Unreadable(place, str(error)) from None
            if len(self._text) - self._at > self._limits.row_bytes:
                raise Unreadable(place, _too_long(self._limits))
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
                raise Unreadable(f"line {self.line} or below", _not_utf8(error)) from None
            more, self._held = raw[: error.start].decode(), raw[error.start :]
        self._text = self._text[self._at :] + more
        self._at = 0


def _read_csv(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    """Records of a CSV with a header, as text; its delimiter is the one that the header has most
    of.
    """
    first = next((line for _, line in _lines(file, limits)), "")
    delimiter = max(_DELIMITERS, key=first.count)
    file.seek(0)
    # The module's limit is one for the process: only ever raised, and lines have their own above.
    csv.field_size_limit(max(csv.field_size_limit(), limits.row_bytes))
    lines = _BoundedLines(_lines(file, limits), limits)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise Unreadable(f"line {start}", f"not CSV: {error}") from None
        if header is None:
            header = _check_header([cell.strip() for cell in cells])
        elif any(cell.strip() for cell in cells):
            place = f"line {start}"
            if len(cells) != len(header):
                problem = f"it has {len(cells)} columns, the header has {len(header)}"
                yield Record(place, {}, problem)
            else:
                yield Record(place, dict(zip(header, cells, strict=True)))


class _BoundedLines:
    """Lines for the CSV reader; a record that spans too many of them is refused."""

    def __init__(self, lines: Iterator[tuple[int, str]], limits: Limits) -> None:
        self._lines = lines
        self._limits = limits
        self._begun = True
        self._start = 0
        self._chars = 0

    def begin(self) -> None:
        """The next line begins a record."""
        self._begun = True

    def __iter__(self) -> _BoundedLines:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        if self._begun:
            self._start, self._chars, self._begun = number, 0, False
        self._chars += len(line)
        if self._chars > self._limits.row_bytes:
            reason = f"{_too_long(self._limits)}; is a quotation mark missing?"
            raise Unreadable(f"line {self._start}", reason)
        return line


def _check_header(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Unreadable("line 1", f"the header names the column {twice[:100]!r} twice")
    return names


def _read_parquet(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Unreadable(
            None,
            "parquet needs the package pyarrow, which is not installed here; install the extra "
            "'parquet' (pip install 'burnish[parquet]'), or upload JSON Lines",
        ) from None
    try:
        opened = parquet.ParquetFile(file)
        if opened.metadata.num_rows > limits.rows:
            raise Unreadable(None, f"the file has more than {limits.rows} rows")
        row = 0
        for batch in opened.iter_batches(batch_size=ROWS_PER_BATCH):
            for value in batch.to_pylist():
                row += 1
                yield Record(f"row {row}", value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Unreadable(None, f"not a readable parquet file: {str(error)[:200]}") from None


def _name(value: Any) -> str:
    names = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _too_long(limits: Limits) -> str:
    return f"it has more than {limits.row_bytes} bytes"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason})"
