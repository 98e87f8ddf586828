"""The file of ends that could not be recorded: JSON lines for a person to look at.

Owns: how letters come in, and how those go whose answers were deleted. Covered: the writer's
process adds to it while the gateway removes. Does not own: what becomes a letter (`writer.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_WITHOUT_TEXT: dict[str, Any] = {"choices": [], "reasoning": None, "start": None}

_BEGINS = re.compile(rb'\{"id": "(\w+)"')
"""How a letter begins, by which half a one is known."""


def add_letter(path: Path, end: Mapping[str, Any]) -> None:
    """Add the end of an answer, without its text where that was not to be stored."""
    letter = dict(end) if end.get("stored", True) else {**end, **_WITHOUT_TEXT}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, os.O_CREAT) as file:
        _append_line(file.fileno(), json.dumps(letter, default=str).encode())


def _append_line(file: int, line: bytes) -> None:
    """All of it or nothing: half a letter would spoil the next one too."""
    size = os.lseek(file, 0, os.SEEK_END)
    # A process that was killed, or a person, may have left a last line without its end.
    begins_line = not size or os.pread(file, 1, size - 1) == b"\n"
    left = memoryview((b"" if begins_line else b"\n") + line + b"\n")
    try:
        while left:
            left = left[os.write(file, left) :]
    except BaseException:
        os.ftruncate(file, size)
        raise


def remove_letters(path: Path, find_gone: Callable[[set[str]], set[str]]) -> int:
    """Remove the letters of answers that `find_gone` picks out of their ids; how many."""
    if not path.exists():
        return 0
    with _locked(path, 0) as file:
        lines = file.readlines()
        ids = [_id_of(line) for line in lines]
        gone = find_gone({name for name in ids if name is not None})
        left = [line for line, name in zip(lines, ids, strict=True) if name not in gone]
        if len(left) < len(lines):
            file.seek(0)  # in place: what is removed is overwritten
            file.writelines(left)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    return len(lines) - len(left)


def _id_of(line: bytes) -> str | None:
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        begun = _BEGINS.match(line)  # of a process that was killed
        return begun[1].decode() if begun else None  # somebody's note is not ours to remove


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[IO[bytes]]:
    with os.fdopen(os.open(path, os.O_RDWR | flags, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
