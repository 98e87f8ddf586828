"""The files of a data set: rows per kind and side in two dialects, and the manifest.

Owns: the layout of a data set's folder, TRL's and OpenAI's form of a row, the content hash. Does
not own which rows there are (`select.py`) or the rows in the database (`feedback/datasets.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from feedback.curation.examples import ExampleKind, Message, Side
from feedback.db import canonical_json, json_in_order

TRL = "trl"
OPENAI = "openai"

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """One file of a data set; `path` is below the directory that holds everything."""

    path: str
    kind: str
    side: str
    dialect: str
    rows: int
    bytes: int
    sha256: str

    @property
    def filename(self) -> str:
        return self.path.rsplit("/", 1)[-1]


class Spool:
    """JSON values on disk for as long as they are needed; each is found again by its offset."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO = path.open("w+b")
        self._end = 0

    def append(self, value: Any) -> int:
        """Write `value` behind the others; its offset in bytes."""
        offset = self._end
        self._end += self._stream.write(json_in_order(value).encode() + b"\n")
        return offset

    def read(self, offset: int) -> Any:
        """The value that was written at `offset`. Not between two calls of `append`."""
        self._stream.seek(offset)
        return json.loads(self._stream.readline())

    def __iter__(self) -> Iterator[Any]:
        self._stream.seek(0)
        for line in self._stream:
            yield json.loads(line)

    def remove(self) -> None:
        """Close and delete the file."""
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class FilesWriter:
    """Writes rows to their files; a kind and side without rows has none.

    Rows come in the order of their ids, which name what they say: so the content hash is that of
    the set, whenever and in whatever order it came about. When it was said (`served_at`, for
    templates that write the date) is not in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._streams: dict[tuple[str, str, str], _Stream] = {}
        self._content = hashlib.sha256()

    def add(self, side: Side, row: Mapping[str, Any]) -> None:
        """Write one row in every dialect that has a form for it."""
        kind = ExampleKind(row["kind"])
        line = json_in_order(row)
        said = json_in_order({key: row[key] for key in row if key != "served_at"})
        self._content.update(f"{kind}\n{side}\n{said}\n".encode())
        self._stream(kind, side, TRL).write(line)
        openai_row = to_openai(row)
        if openai_row is not None:
            self._stream(kind, side, OPENAI).write(json_in_order(openai_row))

    def finish(self, folder_name: str) -> tuple[tuple[WrittenFile, ...], str]:
        """Flush everything to disk and return the files with the content hash (64 hex digits).

        The files' paths begin with `folder_name`.
        """
        files = []
        for (kind, side, dialect), stream in sorted(self._streams.items()):
            files.append(
                WrittenFile(
                    path=f"{folder_name}/{stream.path.name}",
                    kind=kind,
                    side=side,
                    dialect=dialect,
                    rows=stream.rows,
                    bytes=stream.bytes,
                    sha256=stream.finish(),
                )
            )
        return tuple(files), self._content.hexdigest()

    def close(self) -> None:
        """Close what is open; harmless after `finish`."""
        for stream in self._streams.values():
            stream.close()

    def _stream(self, kind: str, side: str, dialect: str) -> _Stream:
        key = (str(kind), str(side), dialect)
        if key not in self._streams:
            suffix = "" if dialect == TRL else f".{dialect}"
            self._streams[key] = _Stream(self._folder / f"{kind}.{side}{suffix}.jsonl")
        return self._streams[key]


class _Stream:
    """One file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.bytes = 0
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, line: str) -> None:
        encoded = line.encode() + b"\n"
        self._file.write(encoded)
        self._digest.update(encoded)
        self.rows += 1
        self.bytes += len(encoded)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def to_openai(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row in OpenAI's fine-tuning format; None for one that has no form there.

    Labelled rows have none, nor pairs whose rejected answer was cut off: every answer ends there.
    OpenAI's chat rows teach every assistant turn that isn't weighted 0, ours only the last.
    """
    prompt: list[Message] = list(row["prompt"])
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if row["kind"] == ExampleKind.SUPERVISED:
        earlier = [
            {**message, "weight": 0} if message["role"] == "assistant" else message
            for message in prompt
        ]
        return {"messages": [*earlier, *row["completion"]], **tools}
    if row["kind"] == ExampleKind.PREFERENCE and not row["rejected"][0].get("cut_off"):
        return {
            "input": {"messages": prompt, **tools},
            "preferred_output": row["chosen"],
            "non_preferred_output": row["rejected"],
        }
    return None


def write_manifest(
    folder: Path, facts: Mapping[str, Any], files: Iterable[WrittenFile], drops: Iterable[Any]
) -> None:
    """Write what the data set is and why every other verdict is not in it, one drop a line."""
    head = {**facts, "files": [{**asdict(file), "path": file.filename} for file in files]}
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(head, indent=2, sort_keys=True, ensure_ascii=False)[:-2])
        stream.write(',\n  "drops": [')
        for number, drop in enumerate(drops):
            stream.write((",\n    " if number else "\n    ") + canonical_json(drop))
        stream.write("\n  ]\n}\n")
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
