"""Small training runs with the tiny random model: rows, configurations, runs in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from feedback.formats.shapes import Kind
from tuner.training.config import TrainingConfig
from tuner.training.rendering import RenderedExample

_WORDS = ("red", "green", "blue", "old", "new", "warm", "cat", "dog", "tree", "house", "river")


def supervised_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths, each with a prompt of its own."""
    source = random.Random(seed)
    return [
        {
            "id": f"s{seed}-{index}",
            "prompt": [{"role": "user", "content": f"{index} {_text(source)}?"}],
            "completion": [{"role": "assistant", "content": _text(source)}],
        }
        for index in range(count)
    ]


def preference_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)
    return [
        {
            "id": f"p{seed}-{index}",
            "prompt": [{"role": "user", "content": f"{index} {_text(source)}?"}],
            "chosen": [{"role": "assistant", "content": _text(source)}],
            "rejected": [{"role": "assistant", "content": _text(source)}],
        }
        for index in range(count)
    ]


def labelled_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Two of three are labelled true."""
    rows = supervised_rows(count, seed=seed)
    return [
        {**row, "id": f"l{row['id']}", "label": index % 3 > 0} for index, row in enumerate(rows)
    ]


def _text(source: random.Random) -> str:
    return " ".join(source.choices(_WORDS, k=source.randint(2, 5)))


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build_config(folder: Path, model: Path, rows: Iterable[dict[str, Any]], **changes: Any) -> Any:
    """A configuration for a run in `folder` on one thread, with its rows written."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "job_id": "ftjob-test",
        "method": "supervised",
        "base_path": model,
        "base_name": "tiny",
        "base_revision": "r1",
        "train_files": (write_rows(folder / "rows.jsonl", rows),),
        "output_dir": folder / "out",
        "references_dir": folder / "references",
        "r": 4,
        "lora_alpha": 8,
        "learning_rate": 1e-3,
        "epochs": 2,
        "batch_size": 4,
        "checkpoint_every_steps": 1,
        "threads": 1,
        "data_hash": "d1",
    }
    return TrainingConfig(**{**settings, **changes})


def train_here(config: TrainingConfig) -> list[dict[str, Any]]:
    """Train in this process; every event."""
    from tuner.training.loop import train

    events: list[dict[str, Any]] = []
    train(config, events.append)
    return events


def example(
    prompt: Iterable[int],
    *completions: Iterable[int],
    name: str = "e",
    weight: float = 1.0,
    label: bool | None = None,
) -> RenderedExample:
    """An example of token ids; two completions make a pair, a label a labelled one."""
    alone: Kind = "supervised" if label is None else "labelled"
    return RenderedExample(
        id=name,
        kind="preference" if len(completions) == 2 else alone,
        prompt=tuple(prompt),
        completions=tuple(tuple(completion) for completion in completions),
        weight=weight,
        group=name,
        label=label,
    )
