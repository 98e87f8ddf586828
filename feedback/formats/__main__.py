"""Reads one upload in a process of its own: `python -P -m feedback.formats FOLDER`.

Owns: the limits to which the kernel holds this process, and that it ends with its parent. Does not
own: starting it, and what becomes of its outcome (`feedback/reading.py`). Whatever a file does to
the reader of it (memory without end, time without end, a fault in a library's C++) ends here.

FOLDER has `order.json` and `original`; `rows.jsonl` and `outcome.json` are written. Standard input
is a pipe whose other end the parent holds open.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from feedback.errors import BadRequest
from feedback.formats.records import Limits, is_of_machine
from feedback.formats.rows import UploadError, read_lines_of_rows

ORDER, ORIGINAL, ROWS, OUTCOME = "order.json", "original", "rows.jsonl", "outcome.json"
OUT_OF_MEMORY = 3  #: exit code
OUT_OF_ORDER = 4  #: exit code: the disk, or what is installed, is at fault
CRASH = "crash.json"  #: the error's type and where it was raised, without its words

_NICENESS = 10  # chats go first
_OTHER_BYTES = 1024 * 1024  # outcome and order


def main(folder: Path) -> int:
    """Read the upload in `folder` and write what came of it; the exit code."""
    try:
        return _read_order(folder)
    except MemoryError:
        return OUT_OF_MEMORY
    except Exception as error:
        with suppress(OSError):
            (folder / CRASH).write_text(json.dumps(_describe(error)), "utf-8")
        if isinstance(error, ImportError) or (isinstance(error, OSError) and is_of_machine(error)):
            traceback.print_exc()
            return OUT_OF_ORDER
        raise


def _describe(error: Exception) -> dict[str, Any]:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return {"error": type(error).__name__, "errno": getattr(error, "errno", None), "place": place}


def _read_order(folder: Path) -> int:
    order = json.loads((folder / ORDER).read_text("utf-8"))
    _end_with_parent()
    _limit(order["memory_bytes"], order["seconds"], order["limits"]["bytes"])
    outcome = read(folder, order)
    (folder / OUTCOME).write_text(json.dumps(outcome), "utf-8")
    return 0


def read(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Write the rows, durable; facts about them, or the reasons against the file."""
    limits, columns = Limits(**order["limits"]), order["columns"]
    kind, count, size, digest = "", 0, 0, hashlib.sha256()
    with (folder / ORIGINAL).open("rb") as original, (folder / ROWS).open("wb") as written:
        try:
            for row, line in read_lines_of_rows(original, order["format"], columns, limits):
                kind, count, size = row["kind"], count + 1, size + len(line)
                written.write(line)
                digest.update(line)
        except UploadError as error:
            return {"problems": [[problem.place, problem.reason] for problem in error.problems]}
        except BadRequest as error:
            return {"refused": {"message": error.message, "param": error.param}}
        written.flush()
        os.fsync(written.fileno())
        original_bytes = original.seek(0, os.SEEK_END)
        original.seek(0)
        return {
            "kind": kind,
            "rows": count,
            "bytes": size,
            "sha256": digest.hexdigest(),
            "original_bytes": original_bytes,
            "original_sha256": hashlib.file_digest(original, "sha256").hexdigest(),
        }


def _limit(memory_bytes: int, seconds: int, row_bytes: int) -> None:
    for what, most, grace in (
        (resource.RLIMIT_AS, memory_bytes, 0),
        (resource.RLIMIT_CPU, seconds, 1),  # SIGXCPU at the first, which says why; then SIGKILL
        (resource.RLIMIT_FSIZE, row_bytes + _OTHER_BYTES, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, hard = resource.getrlimit(what)
        last = most + grace if hard == resource.RLIM_INFINITY else min(most + grace, hard)
        resource.setrlimit(what, (min(most, last), last))
    os.nice(_NICENESS)


def _end_with_parent() -> None:
    """Have the kernel end this process when the parent's end of the pipe closes.

    The pipe's owner gets SIGIO then, which ends a process that doesn't handle it, in C code too.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(sys.stdin.fileno(), fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(sys.stdin.fileno(), fcntl.F_GETFL)
    fcntl.fcntl(sys.stdin.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)
    if select.select([sys.stdin], [], [], 0)[0]:  # it closed before
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
