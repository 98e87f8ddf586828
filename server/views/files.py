"""Files: uploads, and those of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from feedback.tables import File
from feedback.uploads import find_content
from server.views.objects import unix


class FileObject(TypedDict):
    """A file's facts."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed", "error"]
    status_details: str | None
    rows: int
    kind: str | None
    side: str | None
    dataset_id: str | None
    sha256: str


def view_file(row: File, data: Path) -> FileObject:
    """A file's facts; `data` is the directory that holds everything."""
    there = find_content(data, row) is not None
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": unix(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed" if there else "error",
        "status_details": None if there else "its content is no longer on disk",
        "rows": row.rows,
        "kind": row.kind,
        "side": row.side,
        "dataset_id": row.dataset_id,
        "sha256": row.sha256,
    }
