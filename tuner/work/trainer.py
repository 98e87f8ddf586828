"""The trainer child: starts it, reads what it tells, ends it, and starts it again when it crashed.

Owns: one child process and the lines it writes (one JSON object each, `{"event": …}`). Does not own
what the lines mean for the job (`candidates.py`), and holds no torch: the child alone does. Whoever
kills the child with `kill -9` costs the steps since its last checkpoint, nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from tuner.training.config import ExitCode

logger = logging.getLogger(__name__)

Event = dict[str, Any]

_END_SECONDS = 5.0  # less than the supervisor waits for the worker
_POLL_SECONDS = 0.2


class TrainingFailed(Exception):
    """Training ended without an adapter; `code` is stable, `message` for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class TrainerCommand:
    """How to start the child: `argv` gets the configuration's path appended."""

    argv: Sequence[str]
    environment: Mapping[str, str]


def run_trainer(
    command: TrainerCommand,
    config: Path,
    *,
    log: Path,
    on_events: Callable[[Sequence[Event]], None],
    check: Callable[[], None],
    pass_fds: Sequence[int] = (),
    max_crashes: int = 3,
    pause_seconds: float = 1.0,
) -> Event:
    """Train to the end and return the `finished` event.

    `on_events` gets the child's events in batches, as they arrive; `check` is called a few times a
    second. Whatever either raises ends the child, which inherits `pass_fds`. A child that crashes
    is started again and resumes from its checkpoints; `max_crashes` without a new checkpoint in
    between end the training. Raises `TrainingFailed` (the trainer's own code, or
    `trainer_crashed`).
    """
    crashes = 0
    while True:
        outcome = _run_once(command, config, log, on_events, check, pass_fds)
        if outcome.finished is not None and outcome.exit_code == ExitCode.FINISHED:
            return outcome.finished
        if outcome.exit_code in (ExitCode.REFUSED, ExitCode.GUARDED):
            failed = outcome.failed or {}
            raise TrainingFailed(
                str(failed.get("code") or "training_failed"),
                str(failed.get("message") or f"the trainer gave no reason; see {log.name}"),
            )
        crashes = 1 if outcome.progressed else crashes + 1
        ended = _describe_end(outcome.exit_code)
        if crashes >= max_crashes:
            said = (outcome.failed or {}).get("message") or _last_line(log)
            raise TrainingFailed(
                "trainer_crashed",
                f"the trainer {ended}, {crashes} times without a checkpoint in between; "
                f"its last words: {said}",
            )
        logger.warning(
            "Trainer %s, starting it again", ended, extra={"action": "trainer_restarted"}
        )
        on_events([{"event": "restarted", "message": f"The trainer {ended}; starting it again."}])
        _pause(pause_seconds * crashes, check)


@dataclass(slots=True)
class _Outcome:
    exit_code: int
    finished: Event | None = None
    failed: Event | None = None
    progressed: bool = False


def _run_once(
    command: TrainerCommand,
    config: Path,
    log: Path,
    on_events: Callable[[Sequence[Event]], None],
    check: Callable[[], None],
    pass_fds: Sequence[int],
) -> _Outcome:
    log.parent.mkdir(parents=True, exist_ok=True)
    outcome = _Outcome(exit_code=ExitCode.CRASHED)
    with log.open("ab") as stderr, _started(command, config, stderr, pass_fds) as child:
        for events in _batches(child, check):
            for event in events:
                outcome.progressed |= event["event"] == "checkpoint"
                outcome.finished = event if event["event"] == "finished" else outcome.finished
                outcome.failed = event if event["event"] == "failed" else outcome.failed
            on_events(events)
        outcome.exit_code = _wait(child, check)
    return outcome


@contextlib.contextmanager
def _started(
    command: TrainerCommand, config: Path, stderr: IO[bytes], pass_fds: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """The running child, in a process group of its own that ends with the block."""
    child = subprocess.Popen(
        [*command.argv, str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=dict(command.environment),
        start_new_session=True,
        pass_fds=tuple(pass_fds),
    )
    logger.info(
        "Trainer started",
        extra={"action": "trainer_started", "pid": child.pid, "config": str(config)},
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Terminate the child's group, and kill what doesn't end in time."""
    if child.poll() is None:
        _signal_group(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_END_SECONDS)
    # Also what the child itself left behind: it would hold the pipe open.
    _signal_group(child, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _signal_group(child: subprocess.Popen[bytes], sent: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, sent)


def _batches(child: subprocess.Popen[bytes], check: Callable[[], None]) -> Iterator[list[Event]]:
    """What the child tells, in batches, until it closes its output; `check` runs in between."""
    lines: SimpleQueue[bytes | None] = SimpleQueue()
    stdout = child.stdout
    assert stdout is not None  # opened with PIPE

    def read() -> None:
        with contextlib.suppress(ValueError):  # closed by us
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="trainer-output", daemon=True).start()
    open_ = True
    while open_:
        check()
        batch: list[Event] = []
        try:
            line = lines.get(timeout=_POLL_SECONDS)
            while line is not None:
                batch += _parse(line)
                line = lines.get_nowait()
            open_ = False
        except Empty:
            pass
        if batch:
            yield batch


def _parse(line: bytes) -> list[Event]:
    """The event in a line; what isn't one (a library's own print) goes to the log."""
    try:
        event = json.loads(line, parse_constant=lambda _: None)  # NaN: null
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return [event]
    except ValueError:
        pass
    if text := line.decode(errors="replace").strip():
        logger.warning("Trainer printed: %s", text[:500], extra={"action": "trainer_printed"})
    return []


def _wait(child: subprocess.Popen[bytes], check: Callable[[], None]) -> int:
    while True:
        check()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=_POLL_SECONDS)


def _pause(seconds: float, check: Callable[[], None]) -> None:
    waiting = threading.Event()
    for _ in range(max(1, round(seconds / _POLL_SECONDS))):
        check()
        waiting.wait(min(seconds, _POLL_SECONDS))


def _describe_end(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed (SIGKILL), as Linux does when memory runs out"
    if exit_code < 0:
        return f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return f"ended with exit code {exit_code}"


def _last_line(log: Path) -> str:
    """The log's last line, for the reason of a failure."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 2000))
        lines = stream.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "none")
