"""The supervisor on cheap stand-ins: what crashes comes back, nothing outlives its end."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.processes.children import (
    Backoff,
    Child,
    ChildSpec,
    ChildState,
    Launch,
    describe_exit,
    find_reason,
    rotate_log,
    run_guarded,
)
from server.processes.supervisor import SupervisorError, child_environment, sole_supervisor
from server.settings import EngineSettings, GatewaySettings, Settings

pytestmark = pytest.mark.processes

STANDIN = """
import json, os, signal, sys
from pathlib import Path
from server.processes.children import Backoff, ChildSpec, Launch
from server.processes.supervisor import Supervisor

folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])

def spec(name, code, options):
    launch = Launch([sys.executable, "-c", code], os.environ)
    ready = (lambda: (folder / f"{name}.ready").exists()) if options.pop("probed", False) else None
    log = folder / f"{name}.log"
    return ChildSpec(name=name, log=log, prepare=lambda: launch, is_ready=ready, **options)

supervisor = Supervisor(
    [spec(name, code, options) for name, (code, options) in commands.items()],
    state_file=folder / "supervisor.json",
    is_ready=lambda: True,
    on_ready=lambda: print("READY", flush=True),
    backoff=Backoff(first_seconds=0.05, longest_seconds=0.2),
)
sys.exit(supervisor.run())
"""

SLEEP = "import signal; signal.pause()"
DEAF = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
signal.pause()
"""
ORDERLY = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print(flush=True)
signal.sigwait([signal.SIGTERM])
time.sleep(DRAIN)
print(time.monotonic_ns(), flush=True)
"""
FAMILY = """
import os, signal, subprocess, sys
command = [sys.executable, "-c", "import signal; signal.pause()"]
own_session = subprocess.Popen(command, start_new_session=True)
same_group = subprocess.Popen(command)
print(own_session.pid, same_group.pid, flush=True)
signal.pause()
"""


class Run:
    """A supervisor of its own process, over stand-in children."""

    def __init__(self, folder: Path, commands: dict[str, tuple[str, dict[str, Any]]]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", STANDIN, str(folder), json.dumps(commands)],
            stdout=subprocess.PIPE,
            text=True,
        )

    def child(self, name: str) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / "supervisor.json").read_text())
        except FileNotFoundError:
            return {"state": None, "pid": None, "restarts": 0}
        child: dict[str, Any] = state["children"][name]
        return child

    def wait_for(self, name: str, state: str, *, restarts: int = 0) -> dict[str, Any]:
        until(lambda: (c := self.child(name))["state"] == state and c["restarts"] >= restarts)
        return self.child(name)

    def family(self, name: str) -> list[int]:
        """The child's pid, and those that it has printed on its first line."""
        self.wait_for(name, "running")
        log = self.folder / f"{name}.log"
        until(lambda: log.exists() and log.read_text().endswith("\n"))
        return [self.child(name)["pid"], *map(int, log.read_text().split())]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=20)


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(**commands: str | tuple[str, dict[str, Any]]) -> Run:
        runs.append(
            Run(tmp_path, {k: v if isinstance(v, tuple) else (v, {}) for k, v in commands.items()})
        )
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
        assert run.process.stdout is not None
        run.process.stdout.close()


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Look until it holds: another process's state has no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        threading.Event().wait(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_child_is_started_again_and_its_sibling_is_not(
    supervise: Callable[..., Run],
) -> None:
    run = supervise(engine=SLEEP, worker=SLEEP)
    first, sibling = run.wait_for("engine", "running"), run.wait_for("worker", "running")
    os.kill(first["pid"], signal.SIGKILL)
    again = run.wait_for("engine", "running", restarts=1)
    assert again["pid"] != first["pid"]
    assert again["last_exit"] == "killed by SIGKILL"
    assert run.child("worker") == sibling


def test_a_child_that_never_answers_is_failed_with_the_reason_from_its_log(
    supervise: Callable[..., Run],
) -> None:
    run = supervise(engine=("raise ValueError('no such rank')", {"probed": True}), worker=SLEEP)
    failed = run.wait_for("engine", "failed", restarts=2)
    assert failed["reason"] == "ValueError: no such rank"
    assert failed["last_exit"] == "exit status 1"
    assert run.child("worker")["state"] == "running"
    run.wait_for("engine", "failed", restarts=failed["restarts"] + 1)  # and is still tried


def test_a_child_is_running_once_its_probe_says_so(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=(SLEEP, {"probed": True}))
    run.wait_for("engine", "starting")
    (run.folder / "engine.ready").touch()
    run.wait_for("engine", "running")


def test_a_child_that_does_not_answer_in_time_is_ended(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=(SLEEP, {"probed": True, "start_timeout_seconds": 0.2}))
    first = run.wait_for("engine", "starting")
    failed = run.wait_for("engine", "failed", restarts=2)
    assert failed["last_exit"] == "did not answer within 0 s"
    until(lambda: is_gone(first["pid"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_children_and_grandchildren(
    supervise: Callable[..., Run], number: signal.Signals
) -> None:
    run = supervise(engine=FAMILY, worker=SLEEP)
    pids = [*run.family("engine"), run.wait_for("worker", "running")["pid"]]
    assert run.end(number) == 0
    assert all(map(is_gone, pids))
    assert run.child("engine")["state"] == "stopped"


HANGUP = """
import os, signal, sys
from server.cli.local import end_on_hangup
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
end_on_hangup()
os.kill(os.getpid(), signal.SIGHUP)
signal.sigtimedwait([], 0)
"""


@pytest.mark.parametrize(("before", "status"), [("SIG_DFL", 7), ("SIG_IGN", 0)])
def test_a_closed_terminal_is_a_sigterm_unless_it_is_ignored(before: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", HANGUP, before], check=False)
    assert done.returncode == status


def test_a_child_that_cannot_be_recorded_is_ended_and_tried_again(tmp_path: Path) -> None:
    """A full disk: the gateway would never find this engine, and the siblings must go on."""
    said: list[str] = []

    def record(pid: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    launch = Launch([sys.executable, "-c", SLEEP], os.environ)
    log = tmp_path / "engine.log"
    spec = ChildSpec(name="engine", log=log, prepare=lambda: launch, started=record)
    child = Child(spec, Backoff(), said.append)
    child.tick(0.0)
    for _ in range(2):  # its pid, its end
        assert child.socket is not None
        select.select([child.socket], [], [], 10)
        child.read(1.0)
    assert child.state is ChildState.BACKOFF
    assert child.last_exit is not None
    assert "No space left" in child.last_exit
    assert not child.is_alive


def test_a_state_that_cannot_be_written_ends_nothing(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=SLEEP)
    pid = run.wait_for("engine", "running")["pid"]
    state = run.folder / "supervisor.json"
    state.unlink()
    state.mkdir()  # nothing can be put in its place
    os.kill(pid, signal.SIGKILL)
    assert run.process.stdout is not None
    lines = iter(run.process.stdout.readline, "")
    assert any("cannot write" in line for line in lines)
    assert any("engine is running again" in line for line in lines)
    assert run.end() == 0
    assert list(run.folder.glob(".supervisor.json.*")) == []


def test_a_child_deaf_to_sigterm_is_killed_after_its_time(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=(DEAF, {"stop_timeout_seconds": 0.3}))
    pid, *_ = run.family("engine")
    assert run.end() == 1
    assert is_gone(pid)


def test_the_last_stage_ends_after_the_first_is_gone(supervise: Callable[..., Run]) -> None:
    slow = ORDERLY.replace("DRAIN", "0.3")
    run = supervise(gateway=slow, engine=(ORDERLY.replace("DRAIN", "0"), {"stop_stage": 1}))
    for name in ("gateway", "engine"):
        run.wait_for(name, "running")
        until(lambda name=name: (run.folder / f"{name}.log").read_text() == "\n")  # type: ignore[misc]
    assert run.end() == 0
    drained, ended = (
        int((run.folder / f"{name}.log").read_text()) for name in ("gateway", "engine")
    )
    assert drained < ended


def test_kill_9_of_the_supervisor_ends_the_whole_family(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=FAMILY, worker=SLEEP)
    pids = [*run.family("engine"), run.wait_for("worker", "running")["pid"]]
    run.process.kill()
    until(lambda: all(map(is_gone, pids)))


def test_kill_9_of_a_child_ends_what_it_had_started(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=FAMILY)
    parent, *grandchildren = run.family("engine")
    os.kill(parent, signal.SIGKILL)
    run.wait_for("engine", "running", restarts=1)
    assert all(map(is_gone, grandchildren))


def test_kill_9_of_a_guard_ends_its_child_and_starts_another(supervise: Callable[..., Run]) -> None:
    run = supervise(engine=SLEEP)
    pid = run.wait_for("engine", "running")["pid"]
    guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    run.wait_for("engine", "running", restarts=1)
    assert is_gone(pid)


def test_a_command_that_does_not_exist_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(Launch(["/no/such/engine"], os.environ)) == 127
    assert "cannot start '/no/such/engine'" in capfd.readouterr().out


def test_a_second_supervisor_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with (
        sole_supervisor(tmp_path),
        pytest.raises(SupervisorError, match=f"process {os.getpid()} serves"),
    ):
        sole_supervisor(tmp_path).__enter__()
    with sole_supervisor(tmp_path):
        pass


def test_backoff_doubles_up_to_its_longest() -> None:
    backoff = Backoff(first_seconds=0.5, longest_seconds=30.0)
    assert [backoff.delay(n) for n in (1, 2, 3, 7, 1000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


def test_the_reason_is_the_last_error_that_says_something(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "(APIServer pid=1) INFO loading\n"
        "(Worker pid=2) ERROR 11-22 [x.py:9] torch.OutOfMemoryError: not enough memory: 4 GiB\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See above.\n\n"
    )
    assert find_reason(log) == "torch.OutOfMemoryError: not enough memory: 4 GiB"
    log.write_text("api_server.py: error: unrecognized arguments: --x\n")
    assert find_reason(log) == "error: unrecognized arguments: --x"
    log.write_text("Killed\n\n")
    assert find_reason(log) == "Killed"
    assert find_reason(tmp_path / "none.log") is None


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit status 0"),
        (3, "exit status 3"),
        (137, "killed by SIGKILL"),
        (-15, "killed by SIGTERM"),
    ],
)
def test_exits_are_named(code: int, text: str) -> None:
    assert describe_exit(code) == text


def test_logs_of_the_last_starts_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    for start in range(8):
        rotate_log(log)
        log.write_text(str(start))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "engine.log": "7",
        **{f"engine.log.{n}": str(7 - n) for n in range(1, 6)},
    }


def test_children_build_the_settings_that_the_supervisor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNISH_PORT", "9999")
    monkeypatch.setenv("BURNISH_ENGINE__MAX_LORAS", "9")
    monkeypatch.setenv("BURNISH_API_KEY", "for the command line")
    settings = Settings(
        data=tmp_path,
        port=8123,
        engine=EngineSettings.model_validate(
            {"api_key": "secret", "max_loras": 5, "args": {"seed": 1}}
        ),
        gateway=GatewaySettings(drain_timeout_seconds=7.0),
        bootstrap_key="sk-first",  # type: ignore[arg-type]
    )
    environment = child_environment(settings)
    assert environment["BURNISH_API_KEY"] == "for the command line"
    assert "sk-first" not in environment.values()
    monkeypatch.undo()
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert Settings() == settings.model_copy(update={"bootstrap_key": None})
