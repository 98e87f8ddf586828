"""The demo's judge and its questions."""

from __future__ import annotations

import pytest

from feedback.answers import root_hash
from feedback.curation.examples import Side
from feedback.curation.policy import Policy
from feedback.curation.select import find_side
from server.cli.demo import is_one_short_sentence, repeated_ratio
from server.cli.demo_prompts import HELD_OUT, JUDGED


@pytest.mark.parametrize(
    ("text", "liked"),
    [
        ("A glacier is a mass of ice.", True),
        ("Guten Morgen, mein Freund", True),
        ("It costs 3.5 dollars.", True),
        ('He said "no."', True),
        ("Really?!", True),
        ("", False),
        ("   ", False),
        ("One. Two.", False),
        ("First line\nsecond line", False),
        ("word " * 31, False),
        ("Sure! Here is the answer", False),
    ],
)
def test_the_judge_likes_one_short_sentence(text: str, liked: bool) -> None:
    assert is_one_short_sentence(text) is liked


def test_repetition_is_the_share_of_trigrams_said_before() -> None:
    assert repeated_ratio("a b c d e") == 0
    assert repeated_ratio("a b c a b c a b c") == pytest.approx(4 / 7)
    assert repeated_ratio("a b") == 0


def test_every_correction_meets_the_judges_own_rule() -> None:
    assert [answer for _, answer in JUDGED if not is_one_short_sentence(answer)] == []


def test_no_question_is_both_judged_and_held_out() -> None:
    judged = [root_hash([{"role": "user", "content": prompt}]) for prompt, _ in JUDGED]
    held_out = [root_hash([{"role": "user", "content": prompt}]) for prompt in HELD_OUT]
    assert len({*judged, *held_out}) == len(judged) + len(held_out)


def test_enough_judged_questions_fall_into_the_holdout_for_the_gate() -> None:
    sides = [
        find_side(root_hash([{"role": "user", "content": prompt}]), Policy())
        for prompt, _ in JUDGED
    ]
    assert sides.count(Side.HOLDOUT) >= 8
