"""The gate decides whether a candidate is sane and answers better than production does.

Owns: the decision and its reasons, from figures alone. Pure: no database, no model, no clock. Does
not own how the figures are gathered (`measurement.py`), the tests (`significance.py`) or who may
overrule a decision (`moves.check_promotable`).

Two sorts of check. A *primary metric* compares candidate and baseline on the same holdout rows and
says better, worse or neither; a *sanity check* holds what the candidate writes against limits.

- **Pass** takes one primary metric that is better (superiority, any of up to three) and no check
  that failed. Several chances to pass are several chances to pass by luck: three tests at 0.05 each
  passed 14 % of candidates that were no better. So the p-values of "better" are adjusted by Holm's
  method over the metrics that could pass at all, and at most 5 % of such candidates pass, however
  the metrics hang together. A metric with too few prompts for any p-value of 0.05 can't pass and
  takes nothing from the others.
- **Fail** takes one check: a primary metric that is worse (each tested at 0.05 by itself: an
  adjustment would make harm harder to see), or a sanity check past its limit. Nobody has to show
  that a candidate isn't worse; with few prompts harm stays unseen, and the reasons say how few.
- Where a file that a release learned from was deleted, the holdout may hold rows of it. Of the
  candidate's that may be why it is better, so it doesn't pass; of the baseline's it can only hide
  what is better, so it is said and no more.
- **Inconclusive** is everything else, an empty holdout too.

Rows about the same prompt count as one unit (their differences are averaged), because they aren't
independent. The tests are permutation tests, exact where that is cheap: they assume nothing about
the figures' distribution and hold for the six holdout prompts of a person with forty corrections.
With fewer than five units no outcome can be significant at 0.05, nor with fewer than twenty ways to
choose the liked among them where liked and disliked are compared; the check says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from tuner.evaluation.figures import Figures, Labelled, Paired, Written
from tuner.evaluation.significance import holm, separation_p_value, sign_flip_p_value
from tuner.tables import Decision


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where the gate draws its lines; each difference is against the baseline."""

    #: largest one-sided p-value that counts: adjusted for "better", per metric for "worse"
    significance: float = 0.05
    smallest_nll: float = 0.01  #: nats per token; a smaller mean difference counts as none
    smallest_accuracy: float = 0.01
    smallest_separation: float = 0.01  #: nats per token
    tie: float = 0.01  #: nats; a pair's margin nearer to zero is a tie and scores one half
    chosen_nll_rise: float = 0.2  #: nats per token
    empty_rise: float = 0.1
    cut_off_rise: float = 0.25
    repeated_rise: float = 0.15
    general_nll_rise: float = 0.03  #: of the base's, as a share
    kl: float = 0.5  #: from the base, nats per token
    #: longest (and, inverted, shortest) median length against good answers
    length_ratio: float = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison; `message` is a sentence with the figures."""

    name: str
    outcome: Decision
    message: str
    candidate: float | None = None
    baseline: float | None = None
    limit: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As stored and as the API shows it."""
        return {
            "name": self.name,
            "candidate": self.candidate,
            "baseline": self.baseline,
            "limit": self.limit,
            "outcome": str(self.outcome),
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class GateResult:
    """What the gate decided, and why in sentences."""

    decision: Decision
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = field(default=())


def decide(figures: Figures, thresholds: Thresholds | None = None) -> GateResult:
    """Pass, fail or inconclusive; never an error, whatever is missing."""
    thresholds = thresholds or Thresholds()
    primary = _judge_all(
        [
            _test_nll(figures.nll, thresholds),
            _test_pairs(figures.margins, thresholds),
            _test_labelled(figures.labelled, thresholds),
        ],
        thresholds.significance,
    )
    sanity = [
        _check_chosen_nll(figures.chosen_nll, thresholds),
        *_check_answers(figures, thresholds),
        _check_general(figures, thresholds),
        _check_kl(figures, thresholds),
    ]
    hidden = _check_deleted(figures)
    checks = (*primary, *sanity, *hidden)
    doubts = [check.message for check in hidden]
    failed = [check for check in checks if check.outcome == Decision.FAIL]
    better = [check for check in primary if check.outcome == Decision.PASS]
    if failed:
        return GateResult(Decision.FAIL, (*(check.message for check in failed), *doubts), checks)
    if better:
        reasons = [check.message for check in better] + doubts
        if figures.candidate_deleted:
            return GateResult(Decision.INCONCLUSIVE, tuple(reasons), checks)
        # What it cost is told with what it brought.
        reasons += [
            check.message for check in sanity if check.name == "general_nll" and check.limit
        ]
        return GateResult(Decision.PASS, (*reasons, "No check found the candidate worse."), checks)
    if not (figures.nll or figures.margins or figures.labelled):
        return GateResult(
            Decision.INCONCLUSIVE,
            (
                "The holdout has no row that could tell the candidate from the baseline; "
                "judge more answers and make a new data set.",
                *doubts,
            ),
            checks,
        )
    told = [check.message for check in primary if check.candidate is not None]
    reasons = told or [check.message for check in primary]
    return GateResult(Decision.INCONCLUSIVE, (*reasons, *doubts), checks)


def pair_score(margin: float, *, tie: float) -> float:
    """1 for a pair ranked rightly, ½ for a tie, 0 otherwise; the base against itself scores ½."""
    return 0.5 if abs(margin) <= tie else float(margin > 0)


@dataclass(frozen=True, slots=True)
class _Test:
    """One primary metric, tested both ways but not yet judged.

    `said` is the sentence up to the outcome. `smallest_p` is the smallest p-value that its data
    allow, whatever the candidate had done.
    """

    name: str
    said: str
    candidate: float
    baseline: float
    difference: float  #: above 0: the candidate is better
    smallest: float  #: a smaller difference counts as none
    better_p: float
    worse_p: float
    smallest_p: float
    units: int | None = None


def _test_nll(rows: Sequence[Paired], thresholds: Thresholds) -> _Test | Check:
    name, what = "holdout_nll", "Corrections in the holdout"
    if not rows:
        return Check(name, Decision.INCONCLUSIVE, "The holdout has no corrections.")
    candidate, baseline = _means(rows)
    return _test_gains(
        name,
        f"{what}: {candidate:.2f} nats per token under the candidate, {baseline:.2f} under the "
        "baseline (lower is better)",
        candidate,
        baseline,
        _by_unit([(row.unit, row.baseline - row.candidate) for row in rows]),
        thresholds.smallest_nll,
    )


def _test_pairs(rows: Sequence[Paired], thresholds: Thresholds) -> _Test | Check:
    name = "pair_accuracy"
    if not rows:
        return Check(name, Decision.INCONCLUSIVE, "The holdout has no preference pairs.")
    scored = [
        Paired(
            row.unit,
            pair_score(row.candidate, tie=thresholds.tie),
            pair_score(row.baseline, tie=thresholds.tie),
        )
        for row in rows
    ]
    candidate, baseline = _means(scored)
    return _test_gains(
        name,
        f"Preference pairs in the holdout: the candidate ranks {candidate:.0%} rightly, the "
        f"baseline {baseline:.0%}",
        candidate,
        baseline,
        _by_unit([(row.unit, row.candidate - row.baseline) for row in scored]),
        thresholds.smallest_accuracy,
    )


def _test_labelled(rows: Sequence[Labelled], thresholds: Thresholds) -> _Test | Check:
    name = "label_separation"
    true = _by_unit([(row.unit, row.shift) for row in rows if row.label])
    false = _by_unit([(row.unit, row.shift) for row in rows if not row.label])
    if not true or not false:
        return Check(
            name,
            Decision.INCONCLUSIVE,
            f"The holdout has {len(true)} prompts with liked and {len(false)} with disliked "
            "answers; telling them apart needs both.",
        )
    difference = fmean(true) - fmean(false)
    return _Test(
        name,
        f"Against the baseline the candidate moved liked answers by {fmean(true):+.2f} and "
        f"disliked ones by {fmean(false):+.2f} nats per token",
        candidate=difference,
        baseline=0.0,
        difference=difference,
        smallest=thresholds.smallest_separation,
        better_p=separation_p_value(true, false),
        worse_p=separation_p_value([-shift for shift in true], [-shift for shift in false]),
        smallest_p=1 / math.comb(len(true) + len(false), len(true)),
    )


def _test_gains(
    name: str,
    said: str,
    candidate: float,
    baseline: float,
    gains: Sequence[float],
    smallest: float,
) -> _Test:
    """A test of one gain per unit, positive where the candidate is better."""
    return _Test(
        name,
        said,
        candidate,
        baseline,
        difference=fmean(gains),
        smallest=smallest,
        better_p=sign_flip_p_value(gains),
        worse_p=sign_flip_p_value([-gain for gain in gains]),
        smallest_p=0.5 ** sum(gain != 0.0 for gain in gains),
        units=len(gains),
    )


def _check_chosen_nll(rows: Sequence[Paired], thresholds: Thresholds) -> Check:
    """Preference training may lower chosen and rejected together: past a limit, that is ruin."""
    name = "chosen_nll"
    if not rows:
        return Check(name, Decision.INCONCLUSIVE, "The holdout has no preference pairs.")
    candidate, baseline = _means(rows)
    rose = candidate - baseline > thresholds.chosen_nll_rise
    return Check(
        name,
        Decision.FAIL if rose else Decision.PASS,
        f"Preferred answers in the holdout: {candidate:.2f} nats per token under the candidate, "
        f"{baseline:.2f} under the baseline; a rise of up to {thresholds.chosen_nll_rise:g} is "
        "allowed.",
        candidate,
        baseline,
        baseline + thresholds.chosen_nll_rise,
    )


def _check_deleted(figures: Figures) -> list[Check]:
    """What can't be left out of the holdout, because nobody knows any more what was learned."""
    of_both = (("candidate", figures.candidate_deleted), ("baseline", figures.baseline_deleted))
    return [
        Check(
            f"{which}_files_deleted",
            Decision.INCONCLUSIVE,
            f"The {which} learned from {', '.join(files)}, deleted since: holdout rows that were "
            "in it can't be left out.",
        )
        for which, files in of_both
        if files
    ]


def _check_answers(figures: Figures, thresholds: Thresholds) -> list[Check]:
    """Sanity of what was written: shares against the baseline's, length against good answers."""
    mine, theirs = figures.candidate_answers, figures.baseline_answers
    if not mine or not theirs:
        nothing = "No answers were generated."
        names = ("answers_empty", "answers_cut_off", "answers_repeated", "answers_length")
        return [Check(name, Decision.INCONCLUSIVE, nothing) for name in names]
    return [
        _check_share(
            "answers_empty",
            "are empty",
            fmean(answer.words == 0 for answer in mine),
            fmean(answer.words == 0 for answer in theirs),
            thresholds.empty_rise,
        ),
        _check_share(
            "answers_cut_off",
            "were cut off by the length limit",
            fmean(answer.cut_off for answer in mine),
            fmean(answer.cut_off for answer in theirs),
            thresholds.cut_off_rise,
        ),
        _check_share(
            "answers_repeated",
            "of phrases repeat themselves",
            fmean(answer.repeated_ratio for answer in mine),
            fmean(answer.repeated_ratio for answer in theirs),
            thresholds.repeated_rise,
        ),
        _check_length(mine, theirs, thresholds.length_ratio),
    ]


def _check_share(name: str, what: str, candidate: float, baseline: float, rise: float) -> Check:
    return Check(
        name,
        Decision.FAIL if candidate - baseline > rise + 1e-9 else Decision.PASS,
        f"Generated answers: {candidate:.0%} {what} under the candidate, {baseline:.0%} under the "
        f"baseline; a rise of up to {rise:.0%} is allowed.",
        candidate,
        baseline,
        baseline + rise,
    )


def _check_length(mine: Sequence[Written], theirs: Sequence[Written], limit: float) -> Check:
    """Median length: outside the limits and farther off than the baseline's fails."""
    name = "answers_length"
    candidate, baseline = _length_ratio(mine), _length_ratio(theirs)
    if candidate is None or baseline is None:
        return Check(
            name, Decision.INCONCLUSIVE, "The holdout has no good answers to compare lengths with."
        )
    far, before = abs(math.log(candidate)), abs(math.log(baseline))
    outside = far > math.log(limit) and far > before
    return Check(
        name,
        Decision.FAIL if outside else Decision.PASS,
        f"Generated answers have {candidate:.2g} times the length of the holdout's good answers "
        f"under the candidate, {baseline:.2g} times under the baseline; {1 / limit:g} to {limit:g} "
        "times, or nearer than the baseline, is allowed.",
        candidate,
        baseline,
        limit,
    )


def _check_general(figures: Figures, thresholds: Thresholds) -> Check:
    """What was learned must not be paid for with what nobody asked to give up.

    Against the base, so that it can't add up over releases. Past the limit a candidate fails unless
    the baseline was there before it.
    """
    name = "general_nll"
    base, candidate = figures.base_general.nll, figures.candidate_general.nll
    baseline = figures.baseline_general.nll
    if base is None:
        return Check(name, Decision.INCONCLUSIVE, "General text was not read.")
    if candidate is None:
        return Check(
            name,
            Decision.FAIL,
            "General text has a likelihood under the base and none under the candidate, whose "
            f"figures aren't numbers. {_LESS}",
        )
    baseline = base if baseline is None else baseline
    limit = max(base * (1 + thresholds.general_nll_rise), baseline)
    failed = candidate > limit + 1e-9
    said = (
        f"General text, which nobody tunes on: {candidate:.2f} nats per token under the candidate "
        f"({_change(candidate, base)}), {baseline:.2f} under the baseline "
        f"({_change(baseline, base)}), {base:.2f} under the base; a rise of up to "
        f"{thresholds.general_nll_rise:.0%}, or up to the baseline's, is allowed."
    )
    return Check(
        name,
        Decision.FAIL if failed else Decision.PASS,
        f"{said} {_LESS}" if failed else said,
        candidate,
        baseline,
        limit,
    )


def _check_kl(figures: Figures, thresholds: Thresholds) -> Check:
    """A generous limit: what people teach is a move from the base, too."""
    name = "kl"
    candidate, baseline = figures.candidate_general.moved, figures.baseline_general.moved
    if candidate is None or baseline is None:
        return Check(name, Decision.INCONCLUSIVE, "The base's own answers were not compared.")
    limit = max(thresholds.kl, baseline.kl)
    failed = candidate.kl > limit + 1e-9
    said = (
        f"Answers of the base: the candidate is {candidate.kl:.3f} ± {candidate.error:.3f} nats "
        f"per token away from it, the baseline {baseline.kl:.3f}; up to {thresholds.kl:g}, or up "
        "to the baseline's, is allowed."
    )
    return Check(
        name,
        Decision.FAIL if failed else Decision.PASS,
        f"{said} {_LESS}" if failed else said,
        candidate.kl,
        baseline.kl,
        limit,
    )


_LESS = "Tune again with a lower learning rate or fewer epochs, or on more judgements."


def _change(value: float, base: float) -> str:
    return f"{value / base - 1:+.1%}" if base else "–"


def _length_ratio(answers: Sequence[Written]) -> float | None:
    ratios = [
        max(answer.words, 1) / max(answer.good_words, 1)
        for answer in answers
        if answer.good_words is not None
    ]
    return median(ratios) if ratios else None


def _judge_all(tests: Sequence[_Test | Check], significance: float) -> list[Check]:
    """The primary checks in their order, "better" judged by p-values that Holm adjusted.

    What decides which metrics share the adjustment is how much they could show, never which way
    they point; a metric that could not reach `significance` alone never passes (Tarone 1990).
    """
    family = [test for test in tests if isinstance(test, _Test) and test.smallest_p <= significance]
    adjusted = {
        test.name: p
        for test, p in zip(family, holm([test.better_p for test in family]), strict=True)
    }
    checks = []
    for test in tests:
        if isinstance(test, _Test):
            better_p = adjusted.get(test.name, test.better_p)
            outcome, how = _judge(test, better_p, significance, shared_by=len(family))
            message = f"{test.said}; {how}."
            test = Check(test.name, outcome, message, test.candidate, test.baseline, significance)
        checks.append(test)
    return checks


def _judge(
    test: _Test, better_p: float, significance: float, shared_by: int
) -> tuple[Decision, str]:
    """The outcome in a word and in words. `better_p` is the adjusted one."""
    units, difference = test.units, test.difference
    over = "" if units is None else f" over {_prompts(units)}"
    p = f"p = {better_p:.2g}"
    if shared_by > 1 and test.smallest_p <= significance:
        p += f", adjusted for {shared_by} metrics; alone {test.better_p:.2g}"
    if difference >= test.smallest and better_p <= significance:
        return Decision.PASS, f"better{over} ({p})"
    if difference <= -test.smallest and test.worse_p <= significance:
        return Decision.FAIL, f"worse{over} (p = {test.worse_p:.2g})"
    if units is not None and 0.5**units > significance:
        needed = math.ceil(-math.log2(significance))
        return Decision.INCONCLUSIVE, f"{_prompts(units)} can't tell, at least {needed} are needed"
    if units is None and test.smallest_p > significance:
        return Decision.INCONCLUSIVE, "so few prompts can't tell, whatever the difference"
    if abs(difference) < test.smallest:
        return Decision.INCONCLUSIVE, f"a difference too small to count{over}"
    if difference < 0:
        p = f"p = {test.worse_p:.2g}"
    return Decision.INCONCLUSIVE, f"chance isn't excluded{over} ({p})"


def _prompts(count: int) -> str:
    return f"{count} prompt{'' if count == 1 else 's'}"


def _by_unit(values: Sequence[tuple[str, float]]) -> list[float]:
    """One mean per unit, in an order that doesn't depend on that of the rows."""
    units: defaultdict[str, list[float]] = defaultdict(list)
    for unit, value in values:
        units[unit].append(value)
    return [math.fsum(units[unit]) / len(units[unit]) for unit in sorted(units)]


def _means(rows: Sequence[Paired]) -> tuple[float, float]:
    return fmean(row.candidate for row in rows), fmean(row.baseline for row in rows)
