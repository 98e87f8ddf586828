"""What a configuration takes, and which settings make another run of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.training.runs import build_config
from tuner.training.config import PARENT_VARIABLE, ConfigError, TrainingConfig, trainer_environment


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    config = build_config(tmp_path, tmp_path / "model", [])
    found: dict[str, Any] = json.loads(config.to_json())
    return found


def test_a_configuration_survives_its_file(settings: dict[str, Any]) -> None:
    config = TrainingConfig.from_json(json.dumps(settings))
    assert TrainingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rte": 1e-4}, "unknown setting 'learning_rte'"),
        ({"epochs": 0}, "'epochs'"),
        ({"method": "ppo"}, "'method'"),
        ({"method": "kto", "labelled_loss": "bco"}, "'labelled_loss'"),
        ({"r": 64, "max_rank": 16}, "r is 64, above 16"),
        ({"learning_rate": float("nan")}, "learning_rate|JSON"),
    ],
)
def test_what_cannot_be_run_is_named(
    settings: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainingConfig.from_json(json.dumps({**settings, **change}))


@pytest.mark.parametrize(
    ("method", "rate", "epochs"),
    [("supervised", 2e-4, 3), ("dpo", 1e-5, 2), ("kto", 2e-4, 3), ("combined", 4e-4, 4)],
)
def test_each_method_has_its_own_defaults(
    settings: dict[str, Any], method: str, rate: float, epochs: int
) -> None:
    changed = {**settings, "method": method, "learning_rate": None, "epochs": None}
    config = TrainingConfig.from_json(json.dumps(changed))
    assert (config.learning_rate, config.epochs) == (rate, epochs)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"output_dir": "/elsewhere"}, True),
        ({"checkpoint_every_steps": 7}, True),
        ({"max_kl": None}, True),
        ({"seed": 1}, False),
        ({"threads": 2}, False),
        ({"learning_rate": 1e-4}, False),
        ({"base_revision": "r2"}, False),
        # As the settings of labelled examples, so that earlier runs are still the same.
        ({"labelled_loss": "apo_zero_unpaired", "labelled_weight": 2.0}, True),
        ({"method": "kto"}, False),
    ],
)
def test_the_fingerprint_is_of_what_decides_the_adapter(
    settings: dict[str, Any], change: dict[str, Any], same: bool
) -> None:
    one = TrainingConfig.from_json(json.dumps(settings))
    other = TrainingConfig.from_json(json.dumps({**settings, **change}))
    assert (one.fingerprint() == other.fingerprint()) is same


def test_the_child_knows_its_parent_and_threads() -> None:
    environment = trainer_environment(3)
    assert environment[PARENT_VARIABLE] == str(os.getpid())
    assert environment["OMP_NUM_THREADS"] == "3"
