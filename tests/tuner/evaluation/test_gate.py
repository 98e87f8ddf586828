"""The gate's decisions, from figures alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.evaluation.figures import Figures, General, Labelled, Moved, Paired, Written
from tuner.evaluation.gate import Check, Thresholds, decide, pair_score
from tuner.tables import Decision

PASS, FAIL, INCONCLUSIVE = Decision.PASS, Decision.FAIL, Decision.INCONCLUSIVE
GOOD = Written(words=20, cut_off=False, repeated_ratio=0.0, good_words=20)


def nll(*gains: float) -> list[Paired]:
    """One prompt per gain of the candidate, nats per token."""
    return [Paired(f"p{n}", 2.0 - gain, 2.0) for n, gain in enumerate(gains)]


def margins(*pairs: tuple[float, float]) -> list[Paired]:
    return [Paired(f"p{n}", mine, theirs) for n, (mine, theirs) in enumerate(pairs)]


def labelled(true: list[float], false: list[float]) -> list[Labelled]:
    rows = [Labelled(f"t{n}", True, shift) for n, shift in enumerate(true)]
    return rows + [Labelled(f"f{n}", False, shift) for n, shift in enumerate(false)]


def answers(count: int = 10, **changed: Any) -> dict[str, list[Written]]:
    """The baseline's answers are good, the candidate's are changed."""
    values = {
        "words": 20,
        "cut_off": False,
        "repeated_ratio": 0.0,
        "good_words": 20,
        **changed,
    }
    return {"candidate_answers": [Written(**values)] * count, "baseline_answers": [GOOD] * count}


TABLE = [
    ("nothing to tell them apart", Figures(), INCONCLUSIVE),
    ("better on every prompt", Figures(nll=nll(*[0.3] * 6)), PASS),
    ("worse on every prompt", Figures(nll=nll(*[-0.3] * 6)), FAIL),
    ("better, but on too few prompts", Figures(nll=nll(*[0.3] * 4)), INCONCLUSIVE),
    ("better by less than counts", Figures(nll=nll(*[0.005] * 40)), INCONCLUSIVE),
    ("better and worse by turns", Figures(nll=nll(*[0.3, -0.3] * 6)), INCONCLUSIVE),
    ("the same", Figures(nll=nll(*[0.0] * 20)), INCONCLUSIVE),
    ("many rows about one prompt", Figures(nll=[Paired("p", 1.0, 2.0)] * 40), INCONCLUSIVE),
    ("pairs ranked better", Figures(margins=margins(*[(1.0, -1.0)] * 6)), PASS),
    ("pairs ranked worse", Figures(margins=margins(*[(-1.0, 1.0)] * 6)), FAIL),
    ("ties against the base's ties", Figures(margins=margins(*[(0.0, 0.0)] * 20)), INCONCLUSIVE),
    ("liked up, disliked down", Figures(labelled=labelled([0.5] * 5, [-0.5] * 5)), PASS),
    ("liked down, disliked up", Figures(labelled=labelled([-0.5] * 5, [0.5] * 5)), FAIL),
    ("both moved alike", Figures(labelled=labelled([0.5] * 5, [0.5] * 5)), INCONCLUSIVE),
    ("only likes", Figures(labelled=labelled([0.5] * 9, [])), INCONCLUSIVE),
    (
        "better in one, worse in another",
        Figures(nll=nll(*[0.3] * 6), margins=margins(*[(-1.0, 1.0)] * 6)),
        FAIL,
    ),
    (
        "better on five prompts by two metrics that share the chance of luck",
        Figures(nll=nll(*[0.3] * 5), margins=margins(*[(1.0, -1.0)] * 5)),
        INCONCLUSIVE,
    ),
    (
        "better on six prompts by two metrics",
        Figures(nll=nll(*[0.3] * 6), margins=margins(*[(1.0, -1.0)] * 6)),
        PASS,
    ),
    (
        "better on five prompts beside a metric that could show nothing",
        Figures(nll=nll(*[0.3] * 5), margins=margins(*[(0.0, 0.0)] * 9)),
        PASS,
    ),
    (
        "worse on five prompts is seen, whatever the other metrics",
        Figures(nll=nll(*[-0.3] * 5), margins=margins(*[(1.0, -1.0)] * 6)),
        FAIL,
    ),
    (
        "pairs better while chosen answers became unlikely",
        Figures(margins=margins(*[(1.0, -1.0)] * 6), chosen_nll=nll(*[-0.3] * 6)),
        FAIL,
    ),
    ("better and sane", Figures(nll=nll(*[0.3] * 6), **answers()), PASS),
    ("sane alone shows nothing", Figures(**answers()), INCONCLUSIVE),
    ("better, but silent", Figures(nll=nll(*[0.3] * 6), **answers(words=0)), FAIL),
    ("better, but endless", Figures(nll=nll(*[0.3] * 6), **answers(cut_off=True)), FAIL),
    ("better, but stuttering", Figures(nll=nll(*[0.3] * 6), **answers(repeated_ratio=0.9)), FAIL),
    ("better, but five times as long", Figures(nll=nll(*[0.3] * 6), **answers(words=100)), FAIL),
    ("better, but a fifth as long", Figures(nll=nll(*[0.3] * 6), **answers(words=4)), FAIL),
    ("better and three times as long", Figures(nll=nll(*[0.3] * 6), **answers(words=60)), PASS),
]


@pytest.mark.parametrize(
    ("figures", "decision"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_decision(figures: Figures, decision: Decision) -> None:
    result = decide(figures)
    assert result.decision == decision
    assert result.reasons
    assert all(reason.endswith(".") for reason in result.reasons)


def test_every_verdict_has_every_check() -> None:
    names = {check.name for check in decide(Figures()).checks}
    assert names == {check.name for check in decide(Figures(nll=nll(1.0), **answers())).checks}
    assert len(names) == 10


def test_a_candidate_nearer_to_good_length_than_the_baseline_is_not_failed_for_length() -> None:
    result = decide(
        Figures(
            nll=nll(*[0.3] * 6),
            candidate_answers=[Written(100, False, 0.0, 20)] * 6,
            baseline_answers=[Written(200, False, 0.0, 20)] * 6,
        )
    )
    assert result.decision == PASS


def test_reasons_say_how_many_prompts_are_missing() -> None:
    (reason,) = decide(Figures(nll=nll(0.3))).reasons
    assert "1 prompt can't tell, at least 5 are needed" in reason
    result = decide(Figures(nll=nll(*[0.3] * 6)))
    assert "better over 6 prompts (p = 0.016)" in result.reasons[0]


def test_too_few_liked_and_disliked_answers_are_told_whatever_moved() -> None:
    """Two of each can be ordered in six ways, three of each in twenty."""
    few = decide(Figures(labelled=labelled([1.0, 1.1], [-1.0, -1.1])))
    assert "so few prompts can't tell" in few.reasons[0]
    enough = decide(Figures(labelled=labelled([1.0, 1.1, 1.2], [-1.0, -1.1, -1.2])))
    assert enough.decision == Decision.PASS


def test_reasons_name_the_adjusted_p_value_and_what_it_was_adjusted_for() -> None:
    both = Figures(nll=nll(*[0.3] * 6), margins=margins(*[(1.0, -1.0)] * 6))
    reasons = decide(both).reasons
    for reason in reasons[:2]:
        assert "better over 6 prompts (p = 0.031, adjusted for 2 metrics; alone 0.016)" in reason


@pytest.mark.parametrize("together", [False, True], ids=["independent", "of one making"])
def test_at_most_one_in_twenty_candidates_that_are_no_better_passes(together: bool) -> None:
    """Luck in any of three metrics; without the adjustment one in ten passed here."""
    random = np.random.default_rng(20)
    passed = sum(decide(simulate(random, 0.0, together)).decision == PASS for _ in range(1_200))
    # At a true rate of one in ten, 60 or fewer of 1 200 are seen once in ten million simulations.
    assert passed <= 60


@pytest.mark.parametrize(("effect", "least"), [(0.6, 0.5), (1.0, 0.9)])
def test_a_candidate_that_is_better_mostly_passes(effect: float, least: float) -> None:
    random = np.random.default_rng(21)
    passed = sum(decide(simulate(random, effect, False)).decision == PASS for _ in range(200))
    assert passed / 200 >= least


def simulate(random: np.random.Generator, effect: float, together: bool) -> Figures:
    """Ten prompts per metric. `effect` is the mean gain in its standard deviations."""
    luck = random.normal(effect, 1.0, size=(3, 10))
    if together:
        luck[:] = luck[0]
    halves = np.repeat([1.0, -1.0], 5)
    return Figures(
        nll=nll(*(0.2 * luck[0])),
        margins=margins(*[(gain, -gain) for gain in luck[1].tolist()]),
        labelled=[
            Labelled(f"l{n}", bool(half > 0), 0.2 * float(half * gain))
            for n, (half, gain) in enumerate(zip(halves, luck[2], strict=True))
        ],
    )


def test_a_check_shows_itself_as_json() -> None:
    check = Check("holdout_nll", PASS, "Better.", 1.0, 2.0, 0.05)
    assert check.to_json() == {
        "name": "holdout_nll",
        "outcome": "pass",
        "message": "Better.",
        "candidate": 1.0,
        "baseline": 2.0,
        "limit": 0.05,
    }


@pytest.mark.parametrize("gains", [[1.0] * 10, [-1.0] * 10, []])
def test_what_was_learned_from_deleted_files_is_no_proof(gains: list[float]) -> None:
    """A candidate's doubts keep it from passing, those of the baseline are told."""
    plain = decide(Figures(nll=nll(*gains)))
    passes = plain.decision == Decision.PASS
    mine = decide(Figures(nll=nll(*gains), candidate_deleted=["file-a"]))
    theirs = decide(Figures(nll=nll(*gains), baseline_deleted=["file-b"]))
    assert mine.decision == (Decision.INCONCLUSIVE if passes else plain.decision)
    assert theirs.decision == plain.decision
    assert any("learned from file-a" in reason for reason in mine.reasons)
    assert any("learned from file-b" in reason for reason in theirs.reasons)


def test_limits_move_the_line() -> None:
    figures = Figures(nll=nll(*[0.3] * 6))
    assert decide(figures, Thresholds(significance=0.01)).decision == INCONCLUSIVE
    assert decide(figures, Thresholds(smallest_nll=0.5)).decision == INCONCLUSIVE


@pytest.mark.parametrize(
    ("margin", "score"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5), (0.01, 0.5), (-0.01, 0.5)]
)
def test_a_tie_scores_one_half(margin: float, score: float) -> None:
    assert pair_score(margin, tie=0.01) == score


gains = st.lists(st.floats(-3, 3, allow_nan=False), max_size=10)


@given(gains)
def test_swapping_candidate_and_baseline_never_passes_both(values: list[float]) -> None:
    one = decide(Figures(nll=[Paired(str(n), 5 - v, 5) for n, v in enumerate(values)])).decision
    other = decide(Figures(nll=[Paired(str(n), 5, 5 - v) for n, v in enumerate(values)])).decision
    opposite = {PASS: FAIL, FAIL: PASS, INCONCLUSIVE: INCONCLUSIVE}
    assert other == opposite[one]


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.floats(-3, 3)), max_size=20), st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[tuple[str, float]], random: Any) -> None:
    figures = [Paired(unit, 5 - gain, 5) for unit, gain in rows]
    shuffled = random.sample(figures, len(figures))
    assert decide(Figures(nll=figures)).decision == decide(Figures(nll=shuffled)).decision


written = st.lists(
    st.builds(
        Written,
        words=st.integers(0, 500),
        cut_off=st.booleans(),
        repeated_ratio=st.floats(0, 1),
        good_words=st.none() | st.integers(0, 500),
    ),
    max_size=6,
)
paired = st.lists(
    st.builds(Paired, st.sampled_from("abcdef"), st.floats(-50, 50), st.floats(-50, 50)), max_size=8
)
shifts = st.lists(
    st.builds(Labelled, st.sampled_from("abcdef"), st.booleans(), st.floats(-50, 50)), max_size=8
)


@settings(max_examples=50)
@given(st.builds(Figures, paired, paired, paired, shifts, written, written))
def test_whatever_is_missing_there_is_a_verdict_with_reasons(figures: Figures) -> None:
    result = decide(figures)
    assert result.reasons
    failed = [check for check in result.checks if check.outcome == FAIL]
    assert (result.decision == FAIL) == bool(failed)
    better = [check.name for check in result.checks[:3] if check.outcome == PASS]
    assert (result.decision == PASS) == (bool(better) and not failed)


def general(candidate: float, baseline: float, *, kl: tuple[float, float] = (0.0, 0.0)) -> Figures:
    """A base that finds general text worth two nats a token."""
    return Figures(
        candidate_general=General(2 * candidate, 100, Moved(kl[0], 0.01)),
        baseline_general=General(2 * baseline, 100, Moved(kl[1], 0.01)),
        base_general=General(2.0, 100, Moved(0.0, 0.0)),
    )


@pytest.mark.parametrize(
    ("figures", "failed"),
    [
        (general(1.03, 1.0), []),
        (general(1.031, 1.0), ["general_nll"]),
        (general(0.9, 1.0), []),
        (general(1.10, 1.12), []),  # the baseline was there before: better is no harm
        (general(1.13, 1.12), ["general_nll"]),
        (general(1.0, 1.0, kl=(0.5, 0.0)), []),
        (general(1.0, 1.0, kl=(0.51, 0.0)), ["kl"]),
        (general(1.0, 1.0, kl=(0.9, 1.0)), []),
        (general(1.2, 1.0, kl=(2.0, 0.1)), ["general_nll", "kl"]),
        (Figures(), []),
    ],
)
def test_what_is_forgotten_has_limits_against_the_base(figures: Figures, failed: list[str]) -> None:
    result = decide(figures)
    found = [check for check in result.checks if check.outcome == Decision.FAIL]
    assert [check.name for check in found] == failed
    assert (result.decision == Decision.FAIL) is bool(failed)
    for check in found:
        assert check.candidate is not None
        assert check.limit is not None
        assert check.candidate > check.limit


def test_a_pass_says_what_it_cost() -> None:
    measured = general(1.02, 1.0)
    result = decide(replace(measured, nll=nll(*[0.3] * 6)))
    assert result.decision == PASS
    assert "(+2.0%)" in result.reasons[1]


def test_a_candidate_whose_figures_are_no_numbers_fails() -> None:
    base = General(2.0, 100)
    broken = Figures(nll=nll(*[0.3] * 6), baseline_general=base, base_general=base)
    result = decide(broken)
    assert result.decision == Decision.FAIL
    assert "none under the candidate" in result.reasons[0]
    odd = Figures(candidate_general=base, base_general=base)
    assert {check.name: check.outcome for check in decide(odd).checks}["general_nll"] == PASS
