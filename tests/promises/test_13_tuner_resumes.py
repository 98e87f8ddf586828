"""Promise 13: a tuner killed at any point, in mid-save too, resumes to the byte-identical adapter.

Real processes and SIGKILL at moments drawn at random, for each method: one of them, 30 with
`BURNISH_PROMISES=full`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.promise_fixtures import Figures
from tests.promises.scale import is_full
from tests.tuner.training.runs import (
    build_config,
    labelled_rows,
    preference_rows,
    supervised_rows,
)
from tuner.adapters import content_hash
from tuner.methods import METHODS, Method
from tuner.training.config import trainer_environment

ROOT = Path(__file__).resolve().parents[2]
POINTS = 30 if is_full() else 1
KILLS_PER_RUN = 3

Events = list[dict[str, Any]]


def write_config(folder: Path, model: Path, method: Method) -> Path:
    """A run of 36 examples with dropout, validation, and a checkpoint after each step."""
    reads = METHODS[method].reads
    made = {
        "preference": preference_rows,
        "supervised": supervised_rows,
        "labelled": labelled_rows,
    }
    config = build_config(
        folder,
        model,
        [row for kind in reads for row in made[kind](36 // len(reads))],
        method=method,
        lora_dropout=0.1,
        epochs=3,
        batch_size=6,
        validation_share=0.2,
        min_validation=2,
        patience=None,
    )
    (folder / "config.json").write_text(config.to_json())
    return folder / "config.json"


def run(config: Path, *, kill_after: tuple[int, float] | None = None) -> Events:
    """Every event of the trainer; it is killed that many seconds after that many events."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "tuner.training", str(config)],
        env={**os.environ, **trainer_environment(1), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    events: Events = []
    timer: threading.Timer | None = None
    for line in child.stdout:
        if line.endswith(b"\n"):
            events.append(json.loads(line))
        if kill_after is not None and len(events) == kill_after[0]:
            timer = threading.Timer(kill_after[1], child.kill)
            timer.start()
    child.wait()
    if timer is not None:
        timer.cancel()
    child.stdout.close()
    return events


@pytest.mark.promises
@pytest.mark.parametrize("method", Method)
def test_a_killed_tuner_resumes_to_the_byte_identical_adapter(
    tmp_path: Path, tiny_model: Path, method: Method, figures: Figures
) -> None:
    whole = run(write_config(tmp_path / "whole", tiny_model, method))
    assert whole[-1]["event"] == "finished"
    expected = content_hash(Path(whole[-1]["adapter"]))

    source = random.Random(f"13 {method}")
    killed = rounds = 0
    resumed: list[int] = []
    while killed < POINTS:
        rounds += 1
        assert rounds <= 2 * POINTS, "the kills come too late to hit anything"
        config = write_config(tmp_path / str(rounds), tiny_model, method)
        for _ in range(KILLS_PER_RUN):
            # A third of what an untouched run tells, so that several kills fit into one run.
            after = source.randrange(1, len(whole) // KILLS_PER_RUN)
            events = run(config, kill_after=(after, source.uniform(0, 0.05)))
            resumed += [event["resumed_at_step"] for event in events if "resumed_at_step" in event]
            if events[-1]["event"] == "finished":
                break
            killed += 1
        else:
            events = run(config)
            resumed += [event["resumed_at_step"] for event in events if "resumed_at_step" in event]
        assert events[-1]["event"] == "finished"
        assert content_hash(Path(events[-1]["adapter"])) == expected
    figures(kills=killed, runs=rounds, resumed_at_steps=str(resumed), different=0)
    if is_full():
        assert resumed
