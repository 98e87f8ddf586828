"""The trainer as a process: what it writes, how it ends, and with whom it dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.training.runs import build_config, preference_rows, supervised_rows
from tuner.adapters import content_hash
from tuner.training.__main__ import run_config
from tuner.training.config import PARENT_VARIABLE, ExitCode, trainer_environment
from tuner.work.trainer import TrainerCommand, run_trainer

ROOT = Path(__file__).resolve().parents[3]
ARGV = [sys.executable, "-P", "-m", "tuner.training"]
WAIT_SECONDS = 60.0


def environment() -> dict[str, str]:
    return {**os.environ, **trainer_environment(1), "PYTHONPATH": str(ROOT)}


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*ARGV, *arguments],
        env={**environment(), **options},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def test_a_run_through_the_worker_s_own_reader(tmp_path: Path, tiny_model: Path) -> None:
    config = build_config(tmp_path, tiny_model, supervised_rows(6), epochs=1)
    (tmp_path / "config.json").write_text(config.to_json())
    events: list[dict[str, Any]] = []
    finished = run_trainer(
        TrainerCommand(ARGV, environment()),
        tmp_path / "config.json",
        log=tmp_path / "log",
        on_events=events.extend,
        check=lambda: None,
    )
    assert {event["event"] for event in events} >= {"started", "step", "checkpoint", "finished"}
    assert len(content_hash(Path(finished["adapter"]))) == 64


@pytest.mark.parametrize(
    ("changes", "exit_code", "code"),
    [
        ({}, ExitCode.REFUSED, "nothing_to_learn"),
        ({"method": "dpo", "target_modules": ("w_proj",)}, ExitCode.REFUSED, "bad_config"),
        ({"train_files": ("missing.jsonl",)}, ExitCode.REFUSED, "bad_data"),
        ({"method": "dpo", "max_kl": 1e-9}, ExitCode.GUARDED, "guard_kl"),
    ],
)
def test_each_end_has_its_exit_code_and_its_event(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], exit_code: int, code: str
) -> None:
    events: list[dict[str, Any]] = []
    config = build_config(tmp_path, tiny_model, preference_rows(2), **changes)
    assert run_config(config, events.append) == exit_code
    assert (events[-1]["event"], events[-1]["code"]) == ("failed", code)
    assert events[-1]["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"epoch": 3}', "unknown setting 'epoch'"), (None, "can't be read")],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    child = start(str(file))
    output, _ = child.communicate(timeout=WAIT_SECONDS)
    (event,) = [json.loads(line) for line in output.splitlines()]
    assert child.returncode == ExitCode.REFUSED
    assert (event["event"], event["code"]) == ("failed", "bad_config")
    assert said in event["message"]


def test_a_trainer_whose_parent_is_gone_does_not_begin(tmp_path: Path) -> None:
    child = start(str(tmp_path / "config.json"), **{PARENT_VARIABLE: "1"})
    output, _ = child.communicate(timeout=WAIT_SECONDS)
    assert (child.returncode, output) == (ExitCode.CRASHED, b"")


PARENT = """
import os, subprocess, sys
from tuner.training.config import trainer_environment
child = subprocess.Popen(sys.argv[1:], env={**os.environ, **trainer_environment(1)})
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("end", ["parent killed", "terminated"])
def test_the_trainer_ends_with_its_parent_and_on_sigterm(
    tmp_path: Path, tiny_model: Path, end: str
) -> None:
    # It would run for minutes.
    config = build_config(tmp_path, tiny_model, supervised_rows(100), epochs=100, max_kl=None)
    (tmp_path / "config.json").write_text(config.to_json())
    command = [*ARGV, str(tmp_path / "config.json")]
    if end == "parent killed":
        command = [sys.executable, "-P", "-c", PARENT, *command]
    process = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if end == "parent killed":
        trainer = os.pidfd_open(int(line))
        process.stdout.readline()  # its first event: it runs
        process.kill()
    else:
        trainer = os.pidfd_open(process.pid)
        process.send_signal(signal.SIGTERM)
    ended, _, _ = select.select([trainer], [], [], 10.0)
    os.close(trainer)
    process.wait(timeout=WAIT_SECONDS)
    process.stdout.close()
    assert ended
