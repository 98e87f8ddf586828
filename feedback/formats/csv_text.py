"""CSV with a header, as programs and spreadsheets write it.

Owns: which line is the header, what separates the columns, columns without a name. Every cell is a
text. Does not own: what a record says.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from feedback.formats.json_text import read_lines
from feedback.formats.records import (
    MOST_COLUMNS,
    Limits,
    Record,
    Unreadable,
    describe_columns,
    describe_too_long,
    find_twice,
)

_DELIMITERS = ",\t;"
_SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?[,;\t]*\s*', re.IGNORECASE)
_NOTHING = ' "\r\n' + _DELIMITERS


def read_csv(file: BinaryIO, limits: Limits) -> Iterator[Record]:
    """Records by the names in the header.

    Lines without content before the header and Excel's `sep=;` are no header; the delimiter is the
    one that the header has most of, unless `sep=` says which. Columns without a name are passed
    over, as spreadsheets write empty ones behind the last.
    """
    # The module's limit is one for the process: only ever raised, and lines have their own above.
    csv.field_size_limit(max(csv.field_size_limit(), limits.row_bytes))
    numbered = read_lines(file, limits)
    begun = _find_header(numbered)
    if begun is None:
        return
    number, header, delimiter = begun
    lines = _BoundedLines(chain([(number, header)], numbered), limits)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[tuple[int, str]] = []
    width = 0
    while True:
        start = number + reader.line_num
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise Unreadable(f"line {start}", f"not CSV: {error}") from None
        if not width:
            width, columns = len(cells), _read_header(f"line {start}", cells)
        elif any(cell.strip() for cell in cells):
            if len(cells) < width or any(cell.strip() for cell in cells[width:]):
                problem = f"it has {len(cells)} columns, the header has {width}"
                yield Record(f"line {start}", {}, problem)
            else:
                yield Record(f"line {start}", {name: cells[index] for index, name in columns})


def _find_header(numbered: Iterator[tuple[int, str]]) -> tuple[int, str, str] | None:
    """Number and text of the header's first line, and the delimiter; None in an empty file."""
    said = None
    for number, line in numbered:
        if (match := _SEPARATOR_LINE.fullmatch(line)) is not None:
            said = match[1]
        elif line.strip(_NOTHING):
            return number, line, said or max(_DELIMITERS, key=line.count)
    return None


def _read_header(place: str, cells: list[str]) -> list[tuple[int, str]]:
    """Index and name of each column that has a name."""
    if len(cells) > MOST_COLUMNS:
        raise Unreadable(place, describe_columns(len(cells)))
    columns = [(index, name) for index, cell in enumerate(cells) if (name := cell.strip())]
    if (twice := find_twice([name for _, name in columns])) is not None:
        raise Unreadable(place, f"the header names the column {twice[:100]!r} twice")
    return columns


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
            reason = f"{describe_too_long(self._limits)}; is a quotation mark missing?"
            raise Unreadable(f"line {self._start}", reason)
        return line
