"""`burnish serve`: engine, gateway and worker as siblings, each kept alive on its own.

Owns: what is done before they start (model, database), the loop that starts them again, how all of
it ends, and `DATA/run/supervisor.json`, from which the gateway's `/readyz` knows why an engine
isn't there. Imports no FastAPI, no database, no torch. When this process is killed, every child's
guard ends that child (`guard.py`).
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import SecretStr

from server.data_folder import cache_variables, prepare_data
from server.processes.children import (
    Backoff,
    Child,
    ChildSpec,
    Launch,
    run_guarded,
    write_private_json,
)
from server.processes.engine import EngineProcess, EngineSettingsError, answers_ok
from server.settings import BUNDLED_MODEL, Settings
from server.terminal import printable, write_line
from tuner.base_models import MARK, BaseModelError
from tuner.environment import environment_for_others

#: How long Ctrl-C waits for running streams; SIGTERM waits for all of them.
INTERRUPT_DRAIN_SECONDS = 5.0
KILL_SECONDS = 10.0  #: how long a killed child may take to be gone

Say = Callable[[str], None]


class SupervisorError(SystemExit):
    """Nothing can be started; the message says what to do."""


def say(text: str) -> None:
    """A line for whoever looks at the terminal."""
    write_line(f"{time.strftime('%H:%M:%S')} {printable(text)}")


def run(settings: Settings, on_ready: Callable[[], None] | None = None) -> int:
    """Serve until SIGINT, SIGTERM or a closed terminal; returns the exit status.

    `on_ready` is called once, when the gateway answers `/readyz` with 200 for the first time.
    Raises `SupervisorError` when a second supervisor runs on the same data, the port is taken, or
    the model or the database can't be prepared.
    """
    prepare_data(settings)
    os.environ.update(cache_variables(settings.data, os.environ))  # for all that it starts
    with sole_supervisor(settings.run_dir):
        _check_port(settings)
        prepare_model(settings)
        check_engine(settings)
        environment = child_environment(settings)
        with_key = (
            {"BURNISH_BOOTSTRAP_KEY": key.get_secret_value()}
            if (key := settings.bootstrap_key)
            else {}
        )
        if (
            code := run_guarded(_cli(["db", "upgrade", "--no-print-key"], environment | with_key))
        ) != 0:
            raise SupervisorError(
                f"burnish: the database could not be prepared (exit status {code})"
            )
        gateway = local_url(settings)
        supervisor = Supervisor(
            child_specs(settings, environment, gateway),
            state_file=settings.run_dir / "supervisor.json",
            is_ready=lambda: answers_ok(f"{gateway}/readyz"),
            on_ready=on_ready or (lambda: say(f"ready at {gateway}")),
        )
        return supervisor.run()


def local_url(settings: Settings) -> str:
    """The gateway's address as this machine reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def child_specs(settings: Settings, environment: dict[str, str], gateway: str) -> list[ChildSpec]:
    """What is kept alive; the engine ends after the others."""
    specs = [
        ChildSpec(
            name="gateway",
            log=settings.log_dir / "gateway.log",
            prepare=lambda: _cli(["gateway"], environment),
            is_ready=lambda: answers_ok(f"{gateway}/healthz"),
            stop_timeout_seconds=settings.gateway.drain_timeout_seconds + 5.0,
        ),
        ChildSpec(
            name="worker",
            log=settings.log_dir / "worker.log",
            prepare=lambda: _cli(["worker"], environment),
        ),
    ]
    if not settings.engine.urls:
        engine = EngineProcess(settings)
        specs.append(
            ChildSpec(
                name="engine",
                log=engine.log,
                prepare=engine.prepare,
                started=engine.started,
                is_ready=engine.is_ready,
                start_timeout_seconds=settings.engine.start_timeout_seconds,
                stop_stage=1,
            )
        )
    return specs


def child_environment(settings: Settings) -> dict[str, str]:
    """This process's environment with these settings in it, so that children build the same.

    The first admin key is left out: only the child that prepares the database gets it.
    """
    environment = {key: value for key, value in os.environ.items() if not _is_setting(key)}
    for key, value in settings.model_dump(exclude_none=True, exclude={"bootstrap_key"}).items():
        text = str(value.resolve()) if isinstance(value, Path) else value
        environment[f"BURNISH_{key.upper()}"] = (
            text if isinstance(text, str) else json.dumps(text, default=_plain)
        )
    return environment


def _is_setting(key: str) -> bool:
    name = key.removeprefix("BURNISH_").partition("__")[0].lower()
    return key.startswith("BURNISH_") and name in Settings.model_fields


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _cli(arguments: Sequence[str], environment: dict[str, str]) -> Launch:
    return Launch([sys.executable, "-P", "-m", "server.cli", *arguments], environment)


def prepare_model(settings: Settings) -> None:
    """Make the base's directory where that is ours to make: the bundled model, or one of the hub.

    Raises `SupervisorError` when there is no model afterwards.
    """
    target = settings.model_dir
    if (target / MARK).is_file() or (target / "config.json").is_file():
        return
    command = [sys.executable, "-P", "-m", "tuner.training.convert", str(target)]
    if settings.model.path == BUNDLED_MODEL:
        say(f"making the model {BUNDLED_MODEL} once, in {target}: about half a minute")
    elif settings.model.is_hub_name:
        say(f"downloading {settings.model.path} into {target}")
        command += ["--hub", settings.model.path]
        if settings.model.revision:
            command += ["--revision", settings.model.revision]
    else:
        raise SupervisorError(
            f"burnish: no model at {str(target)!r}: give MODEL the directory of a chat model "
            f"(config.json, tokenizer, *.safetensors), a hub name (org/name), or {BUNDLED_MODEL!r}"
        )
    if (code := run_guarded(Launch(command, environment_for_others()))) != 0:
        raise SupervisorError(f"burnish: the model could not be made (exit status {code})")


def check_engine(settings: Settings) -> None:
    """Raise `SupervisorError` where no start of the managed engine could succeed."""
    if settings.engine.urls:
        return
    try:
        EngineProcess(settings).prepare()
    except (EngineSettingsError, BaseModelError, OSError) as error:
        raise SupervisorError(f"burnish: the engine can't be started: {error}") from None


def _check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise SupervisorError(
                f"burnish: cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
                "give another PORT or end what listens there"
            ) from None


@contextmanager
def sole_supervisor(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a data directory; the kernel gives it back however this process ends."""
    with (run_dir / "supervisor.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise SupervisorError(
                f"burnish: process {lock.read().strip() or '?'} serves {str(run_dir.parent)!r} "
                "already; "
                "end it, or give another DATA"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


class Supervisor:
    """Turns the loop: starts children, starts them again, ends them stage by stage."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        state_file: Path,
        is_ready: Callable[[], bool],
        on_ready: Callable[[], None],
        backoff: Backoff | None = None,
        say: Say = say,
    ) -> None:
        self._children = [Child(spec, backoff or Backoff(), say) for spec in specs]
        self._state_file = state_file
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._say = say
        self._ready_due: float | None = 0.0
        self._signals: list[int] = []
        self._written: dict[str, Any] | None = None
        self._started_at = time.time()

    def run(self) -> int:
        """Serve until a signal arrives; 0 when all ended by themselves, 1 when some were killed."""
        waker, wake = socket.socketpair()
        with waker, wake:
            for end in (waker, wake):
                end.setblocking(False)
            before_fd = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                # `nohup` has it ignored, and means it.
                if signal.getsignal(number) is not signal.SIG_IGN
            }
            try:
                while not self._signals:
                    self._turn(waker)
                return self._stop(waker)
            finally:
                for child in self._children:
                    child.kill()
                for number, handler in before.items():
                    signal.signal(number, handler)
                signal.set_wakeup_fd(before_fd)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _turn(self, waker: socket.socket, until: float | None = None) -> None:
        """Wait for the next thing to happen, at most until `until`, and do what follows from it."""
        now = time.monotonic()
        for child in self._children:
            child.tick(now)
        if self._ready_due is not None and now >= self._ready_due and not self._signals:
            ready = self._is_ready()
            self._ready_due = None if ready else time.monotonic() + 0.5
            if ready:
                self._on_ready()
        self._write_state()
        with selectors.DefaultSelector() as selector:
            selector.register(waker, selectors.EVENT_READ)
            for child in self._children:
                if child.socket is not None:
                    selector.register(child.socket, selectors.EVENT_READ, child)
            dues = [
                due
                for due in (until, self._ready_due, *(child.due for child in self._children))
                if due is not None
            ]
            timeout = max(0.0, min(dues) - time.monotonic()) if dues else None
            for key, _ in selector.select(timeout):
                if key.data is None:
                    waker.recv(4096)
                else:
                    key.data.read(time.monotonic())

    def _stop(self, waker: socket.socket) -> int:
        """Stage by stage: the gateway drains first, the engine ends when nobody needs it."""
        first = self._signals[0]
        self._ready_due = None
        self._say(f"{signal.Signals(first).name}: ending; once more to end at once")
        clean = True
        for stage in sorted({child.spec.stop_stage for child in self._children}):
            members = [child for child in self._children if child.spec.stop_stage == stage]
            patience = max(child.spec.stop_timeout_seconds for child in members)
            if first == signal.SIGINT:
                patience = min(patience, INTERRUPT_DRAIN_SECONDS)
            for child in members:
                child.terminate()
            if not self._wait_for(members, waker, patience, hurried=True):
                clean = False
                for child in members:
                    child.kill()
                self._wait_for(members, waker, KILL_SECONDS)
        self._write_state()
        self._say("all ended")
        return 0 if clean else 1

    def _wait_for(
        self,
        members: Sequence[Child],
        waker: socket.socket,
        seconds: float,
        *,
        hurried: bool = False,
    ) -> bool:
        """Turn until these have ended; False after `seconds`, or (`hurried`) at a second signal."""
        deadline = time.monotonic() + seconds
        while any(child.is_alive for child in members):
            if time.monotonic() >= deadline or (hurried and len(self._signals) > 1):
                return False
            self._turn(waker, until=deadline)
        return True

    def _write_state(self) -> None:
        state = {
            "pid": os.getpid(),
            "started_at": self._started_at,
            "children": {child.spec.name: child.status() for child in self._children},
        }
        if state != self._written:
            try:
                write_private_json(self._state_file, state)
            except OSError as error:  # a full disk is no reason to end what serves
                self._say(f"cannot write {self._state_file}: {error}")
            self._written = state
