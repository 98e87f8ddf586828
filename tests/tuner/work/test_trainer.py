"""The trainer child from outside: what it tells, how it ends, and when it is started again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tuner.work.trainer import Event, TrainerCommand, TrainingFailed, run_trainer

TELL = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1]).parent
runs = folder / "runs"
runs.write_text(runs.read_text() + "." if runs.exists() else ".")
run = len(runs.read_text())
def tell(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
"""


class Child:
    """Runs a script as trainer, and keeps what was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        self.told = threading.Event()

    def run(self, script: str, **options: Any) -> Event:
        (self.folder / "child.py").write_text(TELL + script)
        (self.folder / "config.json").write_text("{}")
        command = TrainerCommand(
            [sys.executable, str(self.folder / "child.py")], {**os.environ, "MARK": "given"}
        )
        return run_trainer(
            command,
            self.folder / "config.json",
            log=self.folder / "logs" / "trainer.log",
            **{
                "on_events": self.record,
                "check": lambda: None,
                "pause_seconds": 0.01,
                **options,
            },
        )

    def record(self, events: Sequence[Event]) -> None:
        self.events += events
        self.told.set()

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    @property
    def runs(self) -> int:
        return len((self.folder / "runs").read_text())


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def test_events_arrive_in_order_and_the_last_is_returned(child: Child) -> None:
    finished = child.run(
        """
tell("started", mark=os.environ["MARK"])
print("a library's own words")
for step in range(500):
    tell("step", step=step, loss=float("nan"))
print("said beside", file=sys.stderr)
tell("finished", adapter="here")
"""
    )
    assert finished == {"event": "finished", "adapter": "here"}
    assert child.names == ["started", *["step"] * 500, "finished"]
    assert child.events[0]["mark"] == "given"
    assert [event["step"] for event in child.events[1:-1]] == list(range(500))
    assert child.events[1]["loss"] is None
    assert (child.folder / "logs" / "trainer.log").read_text() == "said beside\n"


def test_a_crash_is_begun_again(child: Child) -> None:
    finished = child.run(
        """
if run == 1:
    tell("step", step=1)
    os.kill(os.getpid(), signal.SIGKILL)
tell("finished", run=run)
"""
    )
    assert finished["run"] == 2
    assert child.names == ["step", "restarted", "finished"]
    assert "SIGKILL" in child.events[1]["message"]


def test_crashes_without_a_checkpoint_in_between_end_the_training(child: Child) -> None:
    with pytest.raises(TrainingFailed) as failed:
        child.run('raise SystemExit("out of luck")', max_crashes=2)
    assert (failed.value.code, child.runs) == ("trainer_crashed", 2)
    assert "ended with exit code 1, 2 times" in failed.value.message
    assert failed.value.message.endswith("its last words: out of luck")


def test_a_checkpoint_makes_a_crash_count_anew(child: Child) -> None:
    finished = child.run(
        """
if run == 5:
    tell("finished")
elif run % 2 == 0:
    tell("checkpoint", step=run)
sys.exit(0 if run == 5 else 1)
""",
        max_crashes=3,
    )
    assert (finished["event"], child.runs) == ("finished", 5)


@pytest.mark.parametrize("exit_code", [2, 3])
def test_a_refusal_or_a_guard_is_not_tried_again(child: Child, exit_code: int) -> None:
    with pytest.raises(TrainingFailed, match="KL is 7") as failed:
        child.run(f'tell("failed", code="kl", message="KL is 7"); sys.exit({exit_code})')
    assert (failed.value.code, child.runs) == ("kl", 1)


def test_an_end_without_an_adapter_is_a_crash(child: Child) -> None:
    with pytest.raises(TrainingFailed, match="ended with exit code 0"):
        child.run('tell("started")', max_crashes=1)


class Ended(Exception):
    """What a test's `check` raises."""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


WAITS = """
tell("started", pid=os.getpid())
time.sleep(60)
"""


def test_what_the_check_raises_ends_the_child(child: Child) -> None:
    def check() -> None:
        if child.told.is_set():
            raise Ended

    with pytest.raises(Ended):
        child.run(WAITS, check=check)
    assert not is_alive(child.events[0]["pid"])
    assert child.runs == 1


def test_what_taking_the_events_raises_ends_the_child(child: Child) -> None:
    def refuse(events: Sequence[Event]) -> None:
        child.record(events)
        raise Ended

    with pytest.raises(Ended):
        child.run(WAITS, on_events=refuse)
    assert not is_alive(child.events[0]["pid"])


def _is_dead(pid: int) -> bool:
    """Gone, or a zombie that init takes."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state.rpartition(")")[2].split()[0] in "ZX"


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.work.trainer._END_SECONDS", 0.1)

    def check() -> None:
        if child.told.is_set():
            raise Ended

    with pytest.raises(Ended):
        child.run(
            """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = os.fork()
if other:
    tell("started", pids=[os.getpid(), other])
time.sleep(60)
""",
            check=check,
        )
    own, other = child.events[0]["pids"]
    assert not is_alive(own)
    deadline = time.monotonic() + 10
    while not _is_dead(other):
        assert time.monotonic() < deadline
        # SIGKILL takes effect a moment later, and a grandchild is nobody's to wait for here.
        time.sleep(0.01)


def test_a_killed_child_costs_nothing_but_a_new_start(child: Child) -> None:
    def kill(events: Sequence[Event]) -> None:
        child.record(events)
        for event in events:
            if event["event"] == "started" and event["run"] == 1:
                os.kill(event["pid"], signal.SIGKILL)

    finished = child.run(
        """
tell("started", pid=os.getpid(), run=run)
if run == 1:
    time.sleep(60)
tell("finished", run=run)
""",
        on_events=kill,
    )
    assert finished["run"] == 2
