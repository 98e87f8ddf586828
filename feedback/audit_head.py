"""The newest entry of the audit log, published to a file beside the database.

Owns: that file. Whoever can change the database alone can cut the log's end off, or write a log of
their own; the file says which entry there was. It is one line of a fixed length, written in place
after the entry's commit, and it never goes back. Does not own: the entries (`audit.py`).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_LINE_BYTES = 12 + 1 + 64 + 1  #: number, blank, hash, line end


def read_head(path: Path) -> tuple[int, str] | None:
    """Number and hash of the entry that was published last; None where there is none."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def publish_head(path: Path, seq: int, entry_hash: str) -> None:
    """Publish an entry, unless a newer one was. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        found = _parse(os.pread(descriptor, _LINE_BYTES, 0))
        if found is None or found[0] < seq:
            os.pwrite(descriptor, f"{seq:>12} {entry_hash}\n".encode("ascii"), 0)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(line: bytes) -> tuple[int, str] | None:
    words = line.decode("ascii", "replace").split()
    if len(words) != 2 or not words[0].isdecimal():
        return None  # of a machine that lost its power in the first write
    return int(words[0]), words[1]
