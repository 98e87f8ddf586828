"""The training rows of one file, all of one form, with the first problems that it has.

Owns: what holds across the records of a file: one form, mapped columns, limits on what comes of it,
how many problems are told. Does not own: where the rows go (`__main__.py`, `feedback/uploads.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from feedback.canonical import json_in_order
from feedback.errors import BadRequest
from feedback.formats.containers import Container, detect_container, read_records
from feedback.formats.records import Limits, Record, Unreadable
from feedback.formats.shapes import (
    KNOWN_KEYS,
    OPTIONAL_KEYS,
    Format,
    Shape,
    build_rows,
    detect_shape,
    find_unused,
)

FORMATS = (*(str(name) for name in Format), *(str(name) for name in Container))
MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one row can't be used, and where it stands (None: it is the whole file)."""

    place: str | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.place is None else f"{self.place}: {self.reason}"


class UploadError(BadRequest):
    """A file that can't be trained on.

    The message names the first lines that are wrong, each with its reason.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        more = "; there may be more" if len(problems) == MOST_PROBLEMS else ""
        message = "; ".join(map(str, problems)) + more
        # Half of a surrogate pair cannot be sent in a reply either.
        message = message.encode(errors="backslashreplace").decode()
        super().__init__(message, param="file", code="invalid_file")


def check_options(format: str | None, columns: Any) -> None:
    """Raise BadRequest unless `format` and the column map can be meant."""
    if format is not None and format not in FORMATS:
        raise BadRequest(
            f"found format {format[:100]!r}, expected one of {', '.join(FORMATS)}; or leave it "
            "out: the content tells",
            param="format",
        )
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not columns:
        raise BadRequest(
            'columns must be an object such as {"prompt": "question", "completion": "answer"}',
            param="columns",
        )
    for ours, theirs in columns.items():
        if ours not in KNOWN_KEYS:
            raise BadRequest(
                f"columns has the key {str(ours)[:100]!r}; expected some of "
                f"{', '.join(sorted(KNOWN_KEYS))}, each with the name that the file has for it",
                param="columns",
            )
        if not isinstance(theirs, str):
            raise BadRequest(f"columns.{ours} must be a column's name", param="columns")


def read_upload(
    file: BinaryIO,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limits: Limits | None = None,
) -> Iterator[dict[str, Any]]:
    """The training rows of a file that can be sought in, all of one kind.

    A row has `kind`, `id`, `prompt`, `weight`, perhaps `tools`, and by kind `completion`, or
    `chosen` and `rejected`, or `completion` and `label`. Rows come as they are read: those that
    came before an `UploadError` are to be thrown away. Raises it with the first problems of the
    file, and BadRequest for options that can't be meant.
    """
    for row, _line in read_lines_of_rows(file, format, columns, limits or Limits()):
        yield row


def read_lines_of_rows(
    file: BinaryIO, format: str | None, columns: Mapping[str, str] | None, limits: Limits
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows, each with its line. After the first problem only further ones are looked for."""
    check_options(format, columns)
    problems: list[Problem] = []
    state = _State(format, columns, limits)
    try:
        detected = detect_container(file)
        container = Container(format) if format in set(Container) else detected
        wanted = KNOWN_KEYS if columns is None else frozenset(columns.values())
        for record in read_records(file, container, limits, wanted):
            try:
                for row, line in state.build(record):
                    if not problems:
                        yield row, line
            except ValueError as error:
                problems.append(Problem(record.place, str(error)))
                if len(problems) == MOST_PROBLEMS:
                    break
    except Unreadable as error:
        problems.append(Problem(error.place, error.reason))
    if not problems:
        problems += state.find_problems()
    if problems:
        raise UploadError(problems)


class _State:
    """What holds across the records of one file."""

    def __init__(
        self, format: str | None, columns: Mapping[str, str] | None, limits: Limits
    ) -> None:
        self._format = Format(format) if format in set(Format) else None
        self._columns = columns
        self._limits = limits
        self._shape: Shape | None = None
        self._bytes = 0
        self.rows = 0
        self.missing = set(columns or ())  #: keys whose columns no record had so far

    def build(self, record: Record) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The rows of a record with their lines. Raises ValueError, and Unreadable past a limit."""
        if record.problem is not None:
            raise ValueError(record.problem)
        value = record.value if self._columns is None else self._rename(record.value)
        shape = detect_shape(value, self._format)
        if self._shape is None:
            self._check_columns(record.place, shape)
            self._shape = shape
        if shape != self._shape:
            raise ValueError(
                f"it has the form of {shape.value}, but the file began with {self._shape.value}; "
                "one file holds one form"
            )
        come = 0
        for row in build_rows(shape, value):
            line = json_in_order(row).encode() + b"\n"
            self.rows += 1
            self._bytes += len(line)
            come += len(line)
            if len(line) > self._limits.row_bytes:
                raise ValueError(f"its row has more than {self._limits.row_bytes} bytes")
            if come > self._limits.record_bytes:
                raise ValueError(
                    "with a row for each answer, and in each all turns before it, it comes to more "
                    f"than {self._limits.record_bytes} bytes; split the chat"
                )
            if self._bytes > self._limits.bytes or self.rows > self._limits.rows:
                raise Unreadable(
                    record.place,
                    f"with a row for each answer the file passes {self._limits.rows} rows or "
                    f"{self._limits.bytes} bytes; split it",
                )
            yield row, line

    def find_problems(self) -> Iterator[Problem]:
        """What is wrong with the file as a whole, once all of it was read."""
        if not self.rows:
            yield Problem(None, "the file has no rows")
        for ours in sorted(self.missing if self.rows else ()):
            theirs = (self._columns or {})[ours]
            yield Problem(None, f"'columns' maps {ours!r} to {theirs[:100]!r}, which no row has")

    def _check_columns(self, place: str, shape: Shape) -> None:
        """Raise `Unreadable` where a mapped column says nothing in the form of the file."""
        unused = find_unused(shape, self._columns or {})
        if unused is not None:
            raise Unreadable(
                place,
                f"it has the form of {shape.value}, which has no use for {unused!r}; leave it out "
                "of 'columns'",
            )

    def _rename(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The mapped columns alone, under our names."""
        assert self._columns is not None
        for ours, theirs in self._columns.items():
            if theirs not in value and ours not in OPTIONAL_KEYS:
                found = ", ".join(repr(str(name)[:40]) for name in list(value)[:10])
                raise ValueError(f"there is no column {theirs[:100]!r}; found {found or 'none'}")
        if self.missing:
            self.missing -= {ours for ours in self.missing if self._columns[ours] in value}
        return {ours: value[theirs] for ours, theirs in self._columns.items() if theirs in value}
