"""Reading a probe's figures."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engines.proof import Outcome, judge

LENGTHS = (24, 40, 16)


def figures(seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[-8 * draw.random() for _ in range(length)] for length in LENGTHS]


def moved(base: list[list[float]], by: float, seed: int) -> list[list[float]]:
    """Each figure off by `by` nats on average, either way."""
    draw = random.Random(seed)
    return [[x + draw.choice((-1, 1)) * by * 2 * draw.random() for x in row] for row in base]


BASE = figures(0)


def outcome(effect: float, noise: float, *, holds: str) -> Outcome:
    """What is said of an engine with `noise` that holds the adapter, the base or other weights."""
    trained = moved(BASE, effect, seed=1)
    weights = {"adapter": trained, "base": BASE, "other": moved(BASE, effect, seed=2)}[holds]
    reference = {"base": BASE, "adapter": trained}
    return judge(reference, moved(BASE, noise, 3), moved(weights, noise, 4)).outcome


@pytest.mark.parametrize(
    ("effect", "noise", "holds", "expected"),
    [
        (1.0, 0.0, "adapter", Outcome.PROVEN),
        (1.0, 3e-5, "adapter", Outcome.PROVEN),
        (1.0, 0.05, "adapter", Outcome.PROVEN),  # bf16 beside an adapter of whole nats
        (0.02, 3e-5, "adapter", Outcome.PROVEN),
        (1.0, 0.0, "base", Outcome.NOT_ACTIVE),
        (0.02, 3e-5, "base", Outcome.NOT_ACTIVE),
        (1.0, 0.05, "base", Outcome.NOT_ACTIVE),
        (1.0, 0.0, "other", Outcome.WRONG_WEIGHTS),
        (1.0, 0.05, "other", Outcome.WRONG_WEIGHTS),
        (5e-4, 0.0, "adapter", Outcome.NO_EFFECT),
        (0.0, 0.3, "adapter", Outcome.NO_EFFECT),
        (0.05, 0.1, "adapter", Outcome.UNPROVEN),  # noise as large as the effect
        (0.05, 0.1, "base", Outcome.UNPROVEN),
        (0.3, 0.3, "other", Outcome.UNPROVEN),
    ],
)
def test_the_outcome_follows_from_effect_noise_and_weights(
    effect: float, noise: float, holds: str, expected: Outcome
) -> None:
    assert outcome(effect, noise, holds=holds) is expected


@given(
    st.floats(0, 2),
    st.floats(0, 1),
    st.sampled_from(["base", "other"]),
)
def test_no_noise_and_no_effect_ever_prove_other_weights(
    effect: float, noise: float, holds: str
) -> None:
    assert outcome(effect, noise, holds=holds) is not Outcome.PROVEN


def test_figures_that_are_no_numbers_prove_nothing() -> None:
    trained = moved(BASE, 1.0, seed=1)
    broken = [[float("nan")] * len(row) for row in BASE]
    proof = judge({"base": BASE, "adapter": trained}, BASE, broken)
    assert proof.outcome is Outcome.WRONG_WEIGHTS


def test_the_message_has_the_figures() -> None:
    trained = moved(BASE, 1.0, seed=1)
    proof = judge({"base": BASE, "adapter": trained}, BASE, BASE)
    assert "still answers like the base" in proof.message()
    assert f"{proof.to_adapter:.4f}" in proof.message()
    assert proof.as_details()["outcome"] == "not_active"
