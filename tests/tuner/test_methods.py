"""The table of methods: it is whole, and those who read it agree with it."""

from __future__ import annotations

from typing import get_args

import pytest

from feedback.curation.examples import ExampleKind
from feedback.formats.shapes import Kind
from tuner.methods import HYPERPARAMETERS, METHODS, Method, default_of, list_shown
from tuner.training.config import TrainingConfig


def test_every_method_says_what_it_reads_and_needs() -> None:
    assert set(METHODS) == set(Method)
    for facts in METHODS.values():
        assert set(facts.needs) <= set(facts.reads)
        assert facts.needs
    assert get_args(Kind) == tuple(ExampleKind)


@pytest.mark.parametrize("method", Method)
def test_every_hyperparameter_is_a_setting_with_a_default_in_its_range(method: Method) -> None:
    assert {known.setting for known in HYPERPARAMETERS.values()} <= set(TrainingConfig.model_fields)
    for name, known in HYPERPARAMETERS.items():
        if method not in known.methods:
            continue
        default = default_of(name, method)
        assert known.find_value(default) == default


def test_a_job_shows_what_openai_shows() -> None:
    older = ["n_epochs", "batch_size", "learning_rate_multiplier"]
    assert list_shown() == list_shown(Method.SUPERVISED) == older
    assert list_shown(Method.DPO) == list_shown(Method.KTO) == [*older, "beta"]
