"""Permutation tests and the adjustment of several of them."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.evaluation.significance import holm, separation_p_value, sign_flip_p_value

gains = st.lists(st.floats(-3, 3, allow_nan=False), max_size=10)


def test_p_values_of_textbook_cases() -> None:
    assert sign_flip_p_value([]) == sign_flip_p_value([0.0, 0.0]) == 1.0
    assert sign_flip_p_value([1.0] * 5) == 1 / 32
    assert sign_flip_p_value([3.0, -1.0]) == 0.5  # 3 - 1 and 3 + 1 of four
    assert separation_p_value([2.0, 3.0], [0.0, 1.0]) == 1 / 6
    assert separation_p_value([], [1.0]) == separation_p_value([1.0], [1.0]) == 1.0


def test_drawn_and_exact_p_values_agree() -> None:
    # 14 differences are counted exactly, 15 are drawn; of 15 with one that hardly matters the
    # exact value is that of 14.
    differences = [0.1 * (-1) ** n * n for n in range(1, 14)] + [1.0]
    exact, drawn = sign_flip_p_value(differences), sign_flip_p_value([*differences, 1e-7])
    assert drawn == pytest.approx(exact, abs=0.02)


def test_the_exact_p_value_counts_every_pattern() -> None:
    differences = [0.7, -0.2, 1.3, 0.4]
    sums = [
        math.fsum(sign * value for sign, value in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=4)
    ]
    expected = sum(found >= math.fsum(differences) - 1e-9 for found in sums) / 16
    assert sign_flip_p_value(differences) == expected


@given(gains)
def test_a_p_value_is_a_probability_and_scale_does_not_matter(values: list[float]) -> None:
    p = sign_flip_p_value(values)
    assert 0 < p <= 1
    assert sign_flip_p_value([4.0 * value for value in values]) == p


def test_holm_of_a_textbook_case() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_lies_between_each_alone_and_bonferroni(values: list[float]) -> None:
    for value, adjusted in zip(values, holm(values), strict=True):
        assert value <= adjusted <= min(1.0, len(values) * value) or adjusted == max(holm(values))
