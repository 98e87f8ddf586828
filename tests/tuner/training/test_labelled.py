"""Labelled examples: whose answer stands behind whose prompt, and what the labels weigh."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuner.training.runs import build_config, example
from tuner.training.labelled import class_weights, mismatch
from tuner.training.rendering import RenderedExample

groups = st.lists(st.integers(0, 3), max_size=12)


def labelled(numbers: list[int]) -> list[RenderedExample]:
    """An example each, whose group is its number; they differ in their answers."""
    return [
        example((9, number), (5, index, 2), name=str(number), label=index % 2 == 0)
        for index, number in enumerate(numbers)
    ]


@given(groups, st.randoms())
def test_an_answer_stands_behind_the_prompt_of_another_group(
    numbers: list[int], shuffled: st.DataObject
) -> None:
    examples = labelled(numbers)
    found = mismatch(examples, max_length=100)
    whose = {one.completions: one.group for one in examples}
    assert len(found) == (len(examples) if len(set(numbers)) > 1 else 0)
    for one in examples:
        if (other := found.get(one.content_hash)) is not None:
            assert other.prompt == one.prompt
            assert whose[other.completions] != one.group
    # Of the examples alone, whatever their order, their labels and what else is trained.
    shuffled.shuffle(examples)
    assert mismatch([*examples, example((1,), (3, 2))], max_length=100) == found


def test_a_mismatched_answer_keeps_to_the_longest_length() -> None:
    long, short = example((1,), (3,) * 6, name="a", label=True), example((4,) * 5, (2,), label=True)
    found = mismatch([long, short], max_length=7)
    assert found[short.content_hash].completions == ((3, 3),)
    assert found[long.content_hash].completions == ((2,),)


@pytest.mark.parametrize(
    ("true", "false", "desirable", "undesirable"),
    [
        (3, 3, 1.0, 1.0),
        (4, 3, 1.0, 1.0),
        (5, 0, 1.0, 1.0),
        (0, 5, 1.0, 1.0),
        (8, 1, 9 / 8 * 4 / 7, 9 * 3 / 7),
        (1, 4, 5 / 2, 5 / 8),
    ],
)
def test_both_labels_count_about_the_same(
    tmp_path: Path, true: int, false: int, desirable: float, undesirable: float
) -> None:
    config = build_config(tmp_path, tmp_path, [], method="kto")
    examples = [example((9,), (2,), label=index < true) for index in range(true + false)]
    found = class_weights(config, examples)
    assert found == pytest.approx((desirable, undesirable))
    assert true * found[0] + false * found[1] == pytest.approx(true + false)
    if true and false:
        assert 1 - 1e-9 <= true * found[0] / (false * found[1]) <= 4 / 3 + 1e-9
    # A weight counts like a repetition, and the other kinds count nothing.
    weighed = [example((9,), (2,), label=label, weight=weight)
               for label, weight in ((True, true), (False, false)) if weight]  # fmt: skip
    assert class_weights(config, [*weighed, example((9,), (2,))]) == pytest.approx(found)
    set_ = config.model_copy(update={"desirable_weight": 0.5})
    assert class_weights(set_, examples) == pytest.approx((0.5, undesirable))
