"""Has an upload read by a child process, with an end to its memory and its time.

Owns: the child, its environment, what its end means for the caller. Does not own: what the child
does (`feedback/formats/__main__.py`), the folder of an upload (`uploads.py`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from feedback.errors import AppError, BadRequest, TooLarge
from feedback.formats.__main__ import CRASH, ORDER, OUT_OF_MEMORY, OUT_OF_ORDER, OUTCOME
from feedback.formats.records import Limits
from feedback.formats.rows import Problem, UploadError

logger = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-P", "-m", "feedback.formats")
_KEPT = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    | {"LD_LIBRARY_PATH", "TMPDIR"}
)
_ADDED = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # fails where the others end the process
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}
_LOG = "reader.log"
_OUT_OF_TIME = -signal.SIGXCPU


@dataclass(frozen=True, slots=True)
class Effort:
    """The most that reading one upload may take."""

    memory_bytes: int = 1024 * 1024 * 1024  #: of address space
    seconds: int = 300  #: of the clock, and of the processor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a file that can be trained on."""

    kind: str
    rows: int
    bytes: int
    sha256: str
    original_bytes: int
    original_sha256: str


class Abandoned(Exception):
    """Nobody waits for the upload any more."""


@dataclass(slots=True)
class Reader:
    """Reads the upload in `folder`, once. `abandon` ends that from any thread."""

    folder: Path
    _process: subprocess.Popen[bytes] | None = None
    _abandoned: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(
        self,
        *,
        format: str | None,
        columns: Mapping[str, str] | None,
        limits: Limits,
        effort: Effort,
    ) -> Outcome:
        """Start the child and wait for its end.

        Raises UploadError for what the file says, TooLarge where memory or time was too little,
        BadRequest where the child ended otherwise, AppError where that is the machine's fault, and
        `Abandoned`.
        """
        order = {
            "format": format,
            "columns": None if columns is None else dict(columns),
            "limits": asdict(limits),
            "memory_bytes": effort.memory_bytes,
            "seconds": effort.seconds,
        }
        (self.folder / ORDER).write_text(json.dumps(order), "utf-8")
        ours, theirs = os.pipe()
        # The child ends when the last holder of `theirs` is gone, and that is this process alone.
        try:
            code = self._run(ours, effort.seconds)
        finally:
            os.close(theirs)
        if self._abandoned:
            raise Abandoned
        return self._understand(code, effort)

    def abandon(self) -> None:
        """End the child; one that wasn't started yet is not started."""
        with self._lock:
            self._abandoned = True
            if self._process is not None:
                self._process.kill()

    def _run(self, lifeline: int, seconds: float) -> int | None:
        """The child's exit code; None where time was up."""
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _ADDED
        with self._lock, (self.folder / _LOG).open("wb") as log:
            try:
                if self._abandoned:
                    return None
                self._process = subprocess.Popen(
                    [*_COMMAND, str(self.folder)],
                    stdin=lifeline,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            finally:
                os.close(lifeline)
        # A wait with a timeout looks twenty times a second; this one returns at once.
        process, late = self._process, threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            code = process.wait()
        finally:
            timer.cancel()
        return None if late.is_set() else code

    def _understand(self, code: int | None, effort: Effort) -> Outcome:
        if code in (None, _OUT_OF_TIME):
            raise _too_much(f"{effort.seconds} seconds (gateway.upload_timeout_seconds)")
        outcome: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            outcome = json.loads((self.folder / OUTCOME).read_text("utf-8"))
        if code != 0 or not outcome:
            # Out of memory ends C++ by SIGABRT, and the kernel's own choice is SIGKILL.
            if code in (OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGKILL) or self._lacked_memory():
                mib = effort.memory_bytes // 2**20
                raise _too_much(f"{mib} MiB of memory (gateway.upload_memory_bytes)")
            crash = self._find_crash()
            logger.error(
                "The reader of an upload ended with code %s",
                code,
                extra={"action": "upload_reader_ended", "exit_code": code, **crash},
            )
            if code == OUT_OF_ORDER:
                raise AppError(
                    f"the file can't be read now ({crash.get('error')}): this is no fault of the "
                    "file; see the gateway's log",
                    code="storage_failed",
                )
            raise BadRequest(
                f"the file ends its reader (exit code {code}); it is damaged, or no training data",
                param="file",
                code="invalid_file",
            )
        if "problems" in outcome:
            raise UploadError([Problem(place, reason) for place, reason in outcome["problems"]])
        if "refused" in outcome:
            raise BadRequest(**outcome["refused"])
        return Outcome(**outcome)

    def _find_crash(self) -> dict[str, Any]:
        """Type and place of the error that ended the child, without words of the file."""
        crash: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            crash = json.loads((self.folder / CRASH).read_text("utf-8"))
        return crash

    def _lacked_memory(self) -> bool:
        """Whether the child's last words are of memory: where it was too little for a traceback."""
        with suppress(OSError):
            said = (self.folder / _LOG).read_bytes()[-4096:]
            return b"MemoryError" in said or b"bad_alloc" in said or b"allocate memory" in said
        return False


def _too_much(what: str) -> TooLarge:
    return TooLarge(
        f"reading the file took more than {what}; split it, or send it as JSON Lines", param="file"
    )
