"""Uploaded files: checked, and kept as the rows that the tuner trains on.

Owns: the folder of each below `DATA/files`, its row, how much one user may keep. Does not own: the
forms of a file (`formats/`), the child that reads it (`reading.py`), who may see one
(`server/access/visibility.py`), jobs that train on it.

A file that is refused leaves nothing behind. What is kept is canonical: TRL's conversational rows
as JSON Lines, beside a manifest with name, size and sha256 of what was sent.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from feedback.curation.files import MANIFEST, TRL, sync_folder
from feedback.db import new_id
from feedback.errors import BadRequest, Conflict
from feedback.formats.__main__ import ORIGINAL, ROWS
from feedback.formats.records import Limits
from feedback.formats.rows import check_options
from feedback.reading import Effort, Reader
from feedback.tables import File, Person

FOLDER = "files"
"""Below the directory that holds everything: a folder for each upload, named by its id."""

_PARTIAL = ".partial"
_LEFT_OVER_SECONDS = 86_400.0
_NAMES_AT_ONCE = 500
_LOCK = 0x75706C6F  # "uplo": on PostgreSQL, uploads of one user are counted one at a time


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that one user may keep; None: no limit."""

    files: int | None = None
    bytes: int | None = None


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
    """A file that is being received, and its reader."""

    id: str
    folder: Path
    reader: Reader

    @property
    def original(self) -> Path:
        """Where what is sent is written, as it comes."""
        return self.folder / ORIGINAL

    def discard(self) -> None:
        """Remove what was not accepted."""
        shutil.rmtree(self.folder, ignore_errors=True)


def begin(data: Path) -> Incoming:
    """A folder for a file that arrives; `discard` removes it again."""
    home = data / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    file_id = new_id("file-")
    folder = home / f"{file_id}{_PARTIAL}"
    folder.mkdir()
    return Incoming(file_id, folder, Reader(folder))


def accept(
    incoming: Incoming,
    *,
    filename: str,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    effort: Effort | None = None,
) -> Upload:
    """Have what was received read by a child, and put its rows in their place, durable.

    Raises UploadError, BadRequest, TooLarge; `Abandoned` where the reader was told to end.
    """
    check_options(format, columns)
    outcome = incoming.reader.read(
        format=format, columns=columns, limits=limits or Limits(), effort=effort or Effort()
    )
    upload = Upload(
        id=incoming.id,
        filename=_clean_filename(filename),
        path=f"{FOLDER}/{incoming.id}/{ROWS}",
        **asdict(outcome),
    )
    facts = {**asdict(upload), "format": format, "columns": columns and dict(columns)}
    with (incoming.folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(facts, stream, indent=2, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    for file in incoming.folder.iterdir():
        if file.name not in (ROWS, MANIFEST):
            file.unlink()
    sync_folder(incoming.folder)
    os.rename(incoming.folder, incoming.folder.with_name(incoming.id))
    sync_folder(incoming.folder.parent)
    return upload


def check_quota(session: Session, user: str, quota: Quota, *, more: Upload | None = None) -> None:
    """Raise BadRequest where a user's uploads, with `more` (None: any), pass the quota.

    All keys of a user count together, and all end users of its applications. Within a transaction
    that writes, the count holds until its end: others of the same user wait.
    """
    if more is not None and session.get_bind().dialect.name == "postgresql":
        key = zlib.crc32(user.encode()) - 2**31
        session.execute(
            text("SELECT pg_advisory_xact_lock(:lock, :key)"), {"lock": _LOCK, "key": key}
        )
    theirs = select(Person.id).where(Person.user == user)
    kept = select(func.count(), func.coalesce(func.sum(File.bytes), 0)).where(
        File.dataset_id.is_(None), File.person_id.in_(theirs)
    )
    files, size = session.execute(kept).one()
    new_size = 1 if more is None else more.bytes
    way = "delete what is no longer needed (GET /v1/files, DELETE /v1/files/{file_id})"
    if quota.files is not None and files + 1 > quota.files:
        raise BadRequest(
            f"{user!r} keeps {files} uploads, and the limit is {quota.files} "
            f"(gateway.max_stored_uploads); {way}",
            code="upload_quota",
        )
    if quota.bytes is not None and size + new_size > quota.bytes:
        came = "" if more is None else f", and this file comes to {more.bytes}"
        raise BadRequest(
            f"the uploads of {user!r} come to {size} bytes{came}; the limit is {quota.bytes} "
            f"(gateway.max_stored_upload_bytes); {way}",
            code="upload_quota",
        )


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


def find_content(data: Path, row: File) -> Path | None:
    """Where the file lies, None where nothing is there; below the directory that holds everything.

    Also for the files of data sets.
    """
    root = data.resolve()
    path = (root / row.path).resolve()
    return path if path.is_relative_to(root) and path.is_file() else None


def remove_content(data: Path, file_id: str) -> None:
    """Remove an upload's folder, once its row is gone."""
    shutil.rmtree(data / FOLDER / file_id, ignore_errors=True)


def remove_leftovers(session: Session, data: Path) -> None:
    """Remove what a killed process left: folders without a row that nobody wrote to for a day."""
    before = time.time() - _LEFT_OVER_SECONDS
    old: list[Path] = []
    with suppress(FileNotFoundError):
        for folder in (data / FOLDER).iterdir():
            with suppress(FileNotFoundError):  # another process removes them too
                if folder.is_dir() and folder.stat().st_mtime < before:
                    old.append(folder)
    for start in range(0, len(old), _NAMES_AT_ONCE):
        folders = old[start : start + _NAMES_AT_ONCE]
        known = set(session.scalars(select(File.id).where(File.id.in_([f.name for f in folders]))))
        for folder in folders:
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)


def _clean_filename(name: str) -> str:
    """The last part of a path, without characters that a header or a terminal acts on."""
    last = name.replace("\\", "/").rpartition("/")[2].encode(errors="replace").decode()
    return "".join(sign for sign in last if sign.isprintable()).strip()[:255] or "upload"
