"""One child process of the supervisor, from start to end.

Owns: starting a command behind `guard.py`, its state, its log, when it is started again. Does not
own: which children there are, or the loop that turns (`supervisor.py`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from server.terminal import printable, write_line

GUARD = Path(__file__).with_name("guard.py")
KEPT_LOGS = 5
_TAIL_BYTES = 64 * 1024
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception|error): \S.*")
_GENERIC = "Engine core initialization failed"  # vLLM's last word, which points further up


class ChildState(StrEnum):
    STARTING = "starting"  #: the process runs and doesn't answer yet
    RUNNING = "running"  #: it answers
    BACKOFF = "backoff"  #: it ended and is started again soon
    #: it never answered in several starts; still tried again, at the longest interval
    FAILED = "failed"
    STOPPED = "stopped"  #: ended because it was told to


@dataclass(frozen=True, slots=True)
class Launch:
    """A command and its whole environment."""

    argv: list[str]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waiting times between starts: doubled from `first_seconds` on, up to `longest_seconds`."""

    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    healthy_seconds: float = 60.0  #: after running so long, the next end counts as the first
    failed_after: int = 3  #: starts in a row that never answered

    def delay(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th end in a row."""
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(failures - 1, 30))


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a child is: how to start it, and how to tell that it works."""

    name: str
    log: Path
    prepare: Callable[[], Launch]  #: called before every start; may raise `OSError` or `ValueError`
    started: Callable[[int], None] = lambda pid: None
    is_ready: Callable[[], bool] | None = None  #: None: ready as soon as it was started
    start_timeout_seconds: float = 120.0
    stop_timeout_seconds: float = 10.0
    #: those of the lowest stage are told to end first, the next when these are gone
    stop_stage: int = 0


class Child:
    """One `ChildSpec`, brought to life again and again. Times are those of `time.monotonic`."""

    def __init__(self, spec: ChildSpec, backoff: Backoff, say: Callable[[str], None]) -> None:
        self.spec = spec
        self.state = ChildState.BACKOFF
        self.pid: int | None = None
        self.restarts = 0
        self.last_exit: str | None = None
        self.reason: str | None = None
        self.guard: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self._backoff = backoff
        self._say = say
        self._starts = 0
        self._failures = 0
        self._failed_starts = 0
        self._began = 0.0
        self._due: float | None = 0.0  #: when to act next: start, or look whether it answers
        self._deadline = 0.0
        self._killed: str | None = None

    @property
    def due(self) -> float | None:
        """When `tick` wants to be called, or None while only the child's end matters."""
        return self._due

    @property
    def is_alive(self) -> bool:
        return self.guard is not None

    def tick(self, now: float) -> None:
        """Start the child, or see whether it answers, where that is due."""
        if self._due is None or now < self._due:
            return
        if self.state in (ChildState.BACKOFF, ChildState.FAILED):
            self._start(now)
        elif (
            self.state is ChildState.STARTING
            and self.spec.is_ready is not None
            and self.spec.is_ready()
        ):
            self._now_running(now)
        elif now > self._deadline and self._killed is None:
            self._killed = f"did not answer within {self.spec.start_timeout_seconds:.0f} s"
            self.kill()
            self._due = None
        else:
            self._due = now + 0.5

    def _start(self, now: float) -> None:
        self._began, self._killed = now, None
        self.restarts = self._starts
        self._starts += 1
        rotate_log(self.spec.log)
        try:
            launch = self.spec.prepare()
            with self.spec.log.open("wb") as log:
                self.guard, self.socket = start_guarded(launch, output=log)
        except (OSError, ValueError) as error:
            self._after_end(now, f"cannot be started: {error}", reason=str(error))
            return
        self.state = ChildState.STARTING
        self._deadline, self._due = now + self.spec.start_timeout_seconds, now + 0.2

    def read(self, now: float) -> None:
        """The child's socket is readable: its pid has arrived, or it has ended."""
        if self.socket is None or self.guard is None:
            return
        try:
            message = self.socket.recv(64)
        except OSError:
            message = b""
        if message:
            self.pid = int(message)
            try:
                self.spec.started(self.pid)
            except OSError as error:  # nobody would find it: end it, and start it again later
                self._killed = f"cannot be recorded: {error}"
                self.kill()
                return
            if self.spec.is_ready is None:
                self._now_running(now)
            return
        self.socket.close()
        code = self.guard.wait()
        kill_session(self.guard.pid)  # only a guard that was killed itself leaves anything here
        self.guard = self.socket = None
        reason = self._killed or find_reason(self.spec.log)
        self._after_end(now, self._killed or describe_exit(code), reason=reason)

    def _now_running(self, now: float) -> None:
        self.state, self._due, self._failed_starts = ChildState.RUNNING, None, 0
        self.reason = None
        again = f" again (restart {self.restarts})" if self.restarts else ""
        self._say(f"{self.spec.name} is running{again} after {now - self._began:.0f} s")

    def _after_end(self, now: float, exit_text: str, *, reason: str | None) -> None:
        was, self.pid, self.last_exit = self.state, None, exit_text
        if was is ChildState.STOPPED:
            self._due = None
            return
        if was is ChildState.RUNNING and now - self._began >= self._backoff.healthy_seconds:
            self._failures = 0
        self._failures += 1
        if was is not ChildState.RUNNING:
            self._failed_starts += 1
        self.reason = reason
        self.state = ChildState.BACKOFF
        delay = self._backoff.delay(self._failures)
        if self._failed_starts >= self._backoff.failed_after:
            self.state, delay = ChildState.FAILED, self._backoff.longest_seconds
        self._due = now + delay
        self._say(
            f"{self.spec.name} ended ({exit_text}); next start in {delay:.1f} s; "
            f"log: {self.spec.log}" + (f"\n    {reason}" if reason else "")
        )

    def terminate(self) -> None:
        """Ask the child to end; it is not started again."""
        self.state, self._due = ChildState.STOPPED, None
        if self.guard is not None:
            self.guard.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child and all that it started, at once."""
        if self.socket is not None:
            with suppress(OSError):  # it has just ended
                self.socket.shutdown(socket.SHUT_WR)

    def status(self) -> dict[str, Any]:
        """What `supervisor.json` says about this child."""
        return {
            "state": self.state.value,
            "pid": self.pid,
            "restarts": self.restarts,
            "last_exit": self.last_exit,
            "reason": self.reason,
            "log": str(self.spec.log.resolve()),
        }


def start_guarded(
    launch: Launch, *, output: IO[bytes] | None = None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a command behind its guard, in a session of its own.

    Closing the socket ends the command with all that it has started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(theirs.fileno()), *launch.argv],
                env=dict(launch.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
    return guard, ours


def run_guarded(launch: Launch) -> int:
    """Run a command to its end, with this process's output; its exit status.

    Where the output is no terminal the command's lines are passed on: a reader that leaves must
    not end the command.
    """
    if sys.stdout.isatty():
        guard, link = start_guarded(launch)
        with link:
            return guard.wait()
    read, write = os.pipe()
    with open(read, encoding="utf-8", errors="replace") as lines:
        with open(write, "wb") as output:
            guard, link = start_guarded(launch, output=output)
        with link:
            for line in lines:
                write_line(printable(line.rstrip("\n")))
            return guard.wait()


def kill_session(session: int) -> None:
    """SIGKILL to every process of a session; none is not an error."""
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        with suppress(OSError):
            fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session:
                os.kill(int(entry), signal.SIGKILL)


def describe_exit(code: int) -> str:
    """`exit status 1`, or `killed by SIGKILL` for 128 + 9 and for -9."""
    number = -code if code < 0 else code - 128
    if number in signal.valid_signals():
        return f"killed by {signal.Signals(number).name}"
    return f"exit status {code}"


def rotate_log(log: Path) -> None:
    """Move `x.log` to `x.log.1`, that to `x.log.2`, and so on; the oldest goes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for number in range(KEPT_LOGS - 1, 0, -1):
        with suppress(FileNotFoundError):
            log.with_name(f"{log.name}.{number}").replace(log.with_name(f"{log.name}.{number + 1}"))
    with suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.1"))


def find_reason(log: Path) -> str | None:
    """The line of a log that most likely says why the process ended: last error, or last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    errors = [match[0] for line in lines if (match := _ERROR.search(line)) and _GENERIC not in line]
    found = errors or [line.strip() for line in lines if line.strip()]
    return found[-1] if found else None


def write_private_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that only this user may read (0600), whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
