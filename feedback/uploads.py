"""Uploaded files: read line by line, checked, and kept as the rows that the tuner trains on.

Owns: what makes an upload acceptable, the folder of each below `DATA/files`, and its row. Does not
own: the forms of a file (`formats/`), who may see one (`server/access.py`), jobs that train on it.

A file that is refused leaves nothing behind. What is kept is canonical: TRL's conversational rows
as JSON Lines, beside a manifest with name, size and sha256 of what was sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.curation.files import MANIFEST, TRL, sync_folder
from feedback.db import canonical_json, new_id
from feedback.errors import BadRequest, Conflict
from feedback.formats.containers import (
    Container,
    Limits,
    Record,
    Unreadable,
    detect_container,
    read_records,
)
from feedback.formats.shapes import KNOWN_KEYS, OPTIONAL_KEYS, Format, Shape, build_rows
from feedback.formats.shapes import detect_shape as detect_record_shape
from feedback.tables import File

FOLDER = "files"
"""Below the directory that holds everything: a folder for each upload, named by its id."""

FORMATS = (*(str(name) for name in Format), *(str(name) for name in Container))
MOST_PROBLEMS = 10

_ROWS = "rows.jsonl"
_ORIGINAL = "original"
_PARTIAL = ".partial"
_LEFT_OVER_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one row can't be used, and where it stands (None: it is the whole file)."""

    place: str | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.place is None else f"{self.place}: {self.reason}"


class UploadError(BadRequest):
    """A file that can't be trained on; names the first lines that are wrong, each with its
    reason.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        more = "; there may be more" if len(problems) == MOST_PROBLEMS else ""
        message = "; ".join(map(str, problems)) + more
        # Half of a surrogate pair cannot be sent in a reply either.
        message = message.encode(errors="backslashreplace").decode()
        super().__init__(message, param="file", code="invalid_file")


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that was checked and lies in its place."""

    id: str
    filename: str
    path: str  #: below the directory that holds everything
    kind: str
    rows: int
    bytes: int
    sha256: str
    original_bytes: int
    original_sha256: str


@dataclass(slots=True)
class Incoming:
    """A file that is being received."""

    id: str
    folder: Path

    @property
    def original(self) -> Path:
        """Where what is sent is written, as it comes."""
        return self.folder / _ORIGINAL


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
    for row, _line in _read(file, format, columns, limits or Limits()):
        yield row


@contextmanager
def receiving(data: Path) -> Iterator[Incoming]:
    """A folder for a file that arrives; what was not accepted in the block is removed."""
    home = data / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    file_id = new_id("file-")
    incoming = Incoming(file_id, home / f"{file_id}{_PARTIAL}")
    incoming.folder.mkdir()
    try:
        yield incoming
    finally:
        shutil.rmtree(incoming.folder, ignore_errors=True)


def accept(
    incoming: Incoming,
    *,
    filename: str,
    format: str | None,
    columns: Mapping[str, str] | None,
    limits: Limits,
) -> Upload:
    """Check what was received, and put its rows in their place, durable.

    Raises UploadError, BadRequest.
    """
    check_options(format, columns)
    rows = incoming.folder / _ROWS
    with incoming.original.open("rb") as original, rows.open("wb") as written:
        kind, count, size, digest = _write(original, written, format, columns, limits)
        original.seek(0)
        original_sha256 = hashlib.file_digest(original, "sha256").hexdigest()
    upload = Upload(
        id=incoming.id,
        filename=_clean_filename(filename),
        path=f"{FOLDER}/{incoming.id}/{_ROWS}",
        kind=kind,
        rows=count,
        bytes=size,
        sha256=digest,
        original_bytes=incoming.original.stat().st_size,
        original_sha256=original_sha256,
    )
    facts = {**asdict(upload), "format": format, "columns": columns and dict(columns)}
    with (incoming.folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(facts, stream, indent=2, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    incoming.original.unlink()
    sync_folder(incoming.folder)
    os.rename(incoming.folder, incoming.folder.with_name(incoming.id))
    sync_folder(incoming.folder.parent)
    return upload


def create_file(session: Session, upload: Upload, *, person_id: str) -> File:
    """The row of an upload; it belongs to the person."""
    file = File(
        id=upload.id,
        filename=upload.filename,
        bytes=upload.bytes,
        sha256=upload.sha256,
        path=upload.path,
        rows=upload.rows,
        kind=upload.kind,
        dialect=TRL,
        person_id=person_id,
    )
    session.add(file)
    session.flush()
    return file


def lock_upload(session: Session, file_id: str) -> File | None:
    """The row, held against jobs that are being made on it; None where it is gone.

    Raises Conflict for a file of a data set.
    """
    file = session.get(File, file_id, with_for_update=True)
    if file is not None and file.dataset_id is not None:
        raise Conflict(
            f"{file_id} is a part of {file.dataset_id}, which never changes; only uploads can be "
            "deleted",
            code="file_of_dataset",
        )
    return file


def remove_content(data: Path, file_id: str) -> None:
    """Remove an upload's folder, once its row is gone."""
    shutil.rmtree(data / FOLDER / file_id, ignore_errors=True)


def remove_leftovers(session: Session, data: Path) -> None:
    """Remove what a killed process left: folders without a row that nobody wrote to for a day."""
    before = time.time() - _LEFT_OVER_SECONDS
    with suppress(FileNotFoundError):
        for folder in (data / FOLDER).iterdir():
            with suppress(FileNotFoundError):  # another process removes them too
                if folder.is_dir() and folder.stat().st_mtime < before:
                    known = select(File.id).where(File.id == folder.name)
                    if session.scalar(known) is None:
                        shutil.rmtree(folder, ignore_errors=True)


def _write(
    original: BinaryIO,
    written: BinaryIO,
    format: str | None,
    columns: Mapping[str, str] | None,
    limits: Limits,
) -> tuple[str, int, int, str]:
    """Write the rows as lines; kind, number, bytes and sha256 of what was written."""
    kind, count, size, digest = "", 0, 0, hashlib.sha256()
    for row, line in _read(original, format, columns, limits):
        kind, count, size = row["kind"], count + 1, size + len(line)
        written.write(line)
        digest.update(line)
    written.flush()
    os.fsync(written.fileno())
    return kind, count, size, digest.hexdigest()


def _read(
    file: BinaryIO, format: str | None, columns: Mapping[str, str] | None, limits: Limits
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows, each with its line. After the first problem only further ones are looked for."""
    check_options(format, columns)
    problems: list[Problem] = []
    state = _State(format, columns, limits)
    try:
        container = Container(format) if format in set(Container) else detect_container(file)
        for record in read_records(file, container, limits):
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
    if not problems and not state.rows:
        problems.append(Problem(None, "the file has no rows"))
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

    def build(self, record: Record) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The rows of a record with their lines. Raises ValueError, and Unreadable past a limit."""
        if record.problem is not None:
            raise ValueError(record.problem)
        value = record.value if self._columns is None else self._rename(record.value)
        shape = detect_record_shape(value, self._format)
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(
                f"it has the form of {shape.value}, but the file began with {self._shape.value}; "
                "one file holds one form"
            )
        for row in build_rows(shape, value):
            line = canonical_json(row).encode() + b"\n"
            self.rows += 1
            self._bytes += len(line)
            if len(line) > self._limits.row_bytes:
                raise ValueError(f"its row has more than {self._limits.row_bytes} bytes")
            if self._bytes > self._limits.bytes or self.rows > self._limits.rows:
                raise Unreadable(
                    record.place,
                    f"with a row for each answer the file passes {self._limits.rows} rows or "
                    f"{self._limits.bytes} bytes; split it",
                )
            yield row, line

    def _rename(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The mapped columns alone, under our names."""
        assert self._columns is not None
        for ours, theirs in self._columns.items():
            if theirs not in value and ours not in OPTIONAL_KEYS:
                found = ", ".join(repr(str(name)[:40]) for name in list(value)[:10])
                raise ValueError(f"there is no column {theirs[:100]!r}; found {found or 'none'}")
        return {ours: value[theirs] for ours, theirs in self._columns.items() if theirs in value}


def _clean_filename(name: str) -> str:
    """The last part of a path, without characters that a header or a terminal acts on."""
    last = name.replace("\\", "/").rpartition("/")[2].encode(errors="replace").decode()
    return "".join(sign for sign in last if sign.isprintable()).strip()[:255] or "upload"
