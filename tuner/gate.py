"""The gate: does a candidate answer better than what is in production, and is it sane?

Owns: the decision and its reasons, from figures alone. Pure: no database, no model, no clock. Does
not own how the figures are gathered (`evaluations.py`) or who may overrule a decision
(`releases.check_promotable`).

Two sorts of check. A *primary metric* compares candidate and baseline on the same holdout rows and
says better, worse or neither; a *sanity check* holds what the candidate writes against limits. Any
failed check fails the candidate; a primary metric that is better passes it; otherwise nothing could
be shown and the decision is inconclusive.

Rows about the same prompt count as one unit (their differences are averaged), because they aren't
independent. The tests are permutation tests, exact where that is cheap: they assume nothing about
the figures' distribution and hold for the six holdout prompts of a person with forty corrections.
With fewer than five units no outcome can be significant at 0.05, and the check says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.tables import Decision

_EXACT_UNITS = 14  # 2**14 sign patterns
_EXACT_SPLITS = 20_000  # label assignments
_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Paired:
    """One holdout row's figure under both releases.

    `unit` is the same for rows about the same prompt.
    """

    unit: str
    candidate: float
    baseline: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """One labelled row; `shift` is its log-probability's move from the baseline, nats per token."""

    unit: str
    label: bool
    shift: float


@dataclass(frozen=True, slots=True)
class Written:
    """What one release wrote to one holdout prompt, measured.

    `words` of the answer, `good_words` of the holdout's good answer to the same prompt (None
    without one), `repeated_ratio` the share of its word trigrams that occurred before (0 to 1).
    """

    words: int
    cut_off: bool
    repeated_ratio: float
    good_words: int | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """All that the gate looks at. Every part may be empty."""

    nll: Sequence[Paired] = ()  #: supervised rows: mean NLL of the completion, nats per token
    chosen_nll: Sequence[Paired] = ()  #: preference rows: the same of the chosen answer
    margins: Sequence[Paired] = ()  #: preference rows: log-probability margin over the base's, nats
    labelled: Sequence[Labelled] = ()
    candidate_answers: Sequence[Written] = ()
    baseline_answers: Sequence[Written] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the gate draws its lines; each difference is against the baseline."""

    significance: float = 0.05  #: largest one-sided p-value that counts, per metric
    smallest_nll: float = 0.01  #: nats per token; a smaller mean difference counts as none
    smallest_accuracy: float = 0.01
    smallest_separation: float = 0.01  #: nats per token
    tie: float = 0.01  #: nats; a pair's margin nearer to zero is a tie and scores one half
    chosen_nll_rise: float = 0.2  #: nats per token
    empty_rise: float = 0.1
    cut_off_rise: float = 0.25
    repeated_rise: float = 0.15
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
class Verdict:
    """What the gate decided, and why in sentences."""

    decision: Decision
    reasons: tuple[str, ...]
    checks: tuple[Check, ...] = field(default=())


def decide(figures: Figures, limits: Limits | None = None) -> Verdict:
    """Pass, fail or inconclusive; never an error, whatever is missing."""
    limits = limits or Limits()
    primary = [
        _check_nll(figures.nll, limits),
        _check_pairs(figures.margins, limits),
        _check_labelled(figures.labelled, limits),
    ]
    sanity = [_check_chosen_nll(figures.chosen_nll, limits), *_check_answers(figures, limits)]
    checks = (*primary, *sanity)
    failed = [check for check in checks if check.outcome == Decision.FAIL]
    better = [check for check in primary if check.outcome == Decision.PASS]
    if failed:
        return Verdict(Decision.FAIL, tuple(check.message for check in failed), checks)
    if better:
        reasons = [check.message for check in better]
        return Verdict(Decision.PASS, (*reasons, "No check found the candidate worse."), checks)
    if not (figures.nll or figures.margins or figures.labelled):
        return Verdict(
            Decision.INCONCLUSIVE,
            (
                "The holdout has no row that could tell the candidate from the baseline; "
                "judge more answers and make a new data set.",
            ),
            checks,
        )
    told = [check.message for check in primary if check.candidate is not None]
    return Verdict(Decision.INCONCLUSIVE, tuple(told or [c.message for c in primary]), checks)


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """One-sided p-value of `mean > 0` under the null that each difference's sign is a coin's.

    Exact up to 14 non-zero differences, 20 000 seeded draws above (counted with the observed one,
    so never 0). Fisher 1935; Phipson and Smyth 2010 for the added one.
    """
    values: NDArray[np.float64] = np.array([d for d in differences if d != 0.0], dtype=np.float64)
    if values.size == 0:
        return 1.0
    observed = values.sum()
    slack = 1e-9 * np.abs(values).sum()  # sums of the same terms in another order
    if values.size <= _EXACT_UNITS:
        patterns = np.arange(2**values.size)[:, None] >> np.arange(values.size) & 1
        sums = (1 - 2 * patterns) @ values
        return float(np.mean(sums >= observed - slack))
    signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_DRAWS, values.size))
    return float((np.count_nonzero(signs @ values >= observed - slack) + 1) / (_DRAWS + 1))


def separation_p_value(true: Sequence[float], false: Sequence[float]) -> float:
    """One-sided p-value of `mean(true) > mean(false)` under the null that labels are exchangeable.

    Exact while there are at most 20 000 ways to hand out the labels, that many seeded draws above.
    """
    values: NDArray[np.float64] = np.array([*true, *false], dtype=np.float64)
    k = len(true)
    if not true or not false or np.ptp(values) == 0.0:
        return 1.0
    observed = values[:k].sum()
    slack = 1e-9 * np.abs(values).sum()
    if math.comb(values.size, k) <= _EXACT_SPLITS:
        sums = np.array([values[list(c)].sum() for c in combinations(range(values.size), k)])
        return float(np.mean(sums >= observed - slack))
    random = np.random.default_rng(0)
    sums = np.array([random.permutation(values)[:k].sum() for _ in range(_DRAWS)])
    return float((np.count_nonzero(sums >= observed - slack) + 1) / (_DRAWS + 1))


def pair_score(margin: float, *, tie: float) -> float:
    """1 for a pair ranked rightly, ½ for a tie, 0 otherwise; the base against itself scores ½."""
    return 0.5 if abs(margin) <= tie else float(margin > 0)


def _check_nll(rows: Sequence[Paired], limits: Limits) -> Check:
    name, what = "holdout_nll", "Corrections in the holdout"
    if not rows:
        return Check(name, Decision.INCONCLUSIVE, "The holdout has no corrections.")
    candidate, baseline = _means(rows)
    gains = _by_unit([(row.unit, row.baseline - row.candidate) for row in rows])
    outcome, how = _compare(gains, limits.smallest_nll, limits.significance)
    return Check(
        name,
        outcome,
        f"{what}: {candidate:.2f} nats per token under the candidate, {baseline:.2f} under the "
        f"baseline (lower is better); {how}.",
        candidate,
        baseline,
        limits.significance,
    )


def _check_pairs(rows: Sequence[Paired], limits: Limits) -> Check:
    name = "pair_accuracy"
    if not rows:
        return Check(name, Decision.INCONCLUSIVE, "The holdout has no preference pairs.")
    scored = [
        Paired(
            row.unit,
            pair_score(row.candidate, tie=limits.tie),
            pair_score(row.baseline, tie=limits.tie),
        )
        for row in rows
    ]
    candidate, baseline = _means(scored)
    gains = _by_unit([(row.unit, row.candidate - row.baseline) for row in scored])
    outcome, how = _compare(gains, limits.smallest_accuracy, limits.significance)
    return Check(
        name,
        outcome,
        f"Preference pairs in the holdout: the candidate ranks {candidate:.0%} rightly, the "
        f"baseline {baseline:.0%}; {how}.",
        candidate,
        baseline,
        limits.significance,
    )


def _check_labelled(rows: Sequence[Labelled], limits: Limits) -> Check:
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
    rises = separation_p_value(true, false)
    falls = separation_p_value([-shift for shift in true], [-shift for shift in false])
    outcome, how = _judge(difference, rises, falls, limits.smallest_separation, limits.significance)
    return Check(
        name,
        outcome,
        f"Against the baseline the candidate moved liked answers by {fmean(true):+.2f} and "
        f"disliked ones by {fmean(false):+.2f} nats per token; {how}.",
        difference,
        0.0,
        limits.significance,
    )


def _check_chosen_nll(rows: Sequence[Paired], limits: Limits) -> Check:
    """Preference training may lower chosen and rejected together: past a limit, that is ruin."""
    name = "chosen_nll"
    if not rows:
        return Check(name, Decision.INCONCLUSIVE, "The holdout has no preference pairs.")
    candidate, baseline = _means(rows)
    rose = candidate - baseline > limits.chosen_nll_rise
    return Check(
        name,
        Decision.FAIL if rose else Decision.PASS,
        f"Preferred answers in the holdout: {candidate:.2f} nats per token under the candidate, "
        f"{baseline:.2f} under the baseline; a rise of up to {limits.chosen_nll_rise:g} is "
        "allowed.",
        candidate,
        baseline,
        baseline + limits.chosen_nll_rise,
    )


def _check_answers(figures: Figures, limits: Limits) -> list[Check]:
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
            limits.empty_rise,
        ),
        _check_share(
            "answers_cut_off",
            "were cut off by the length limit",
            fmean(answer.cut_off for answer in mine),
            fmean(answer.cut_off for answer in theirs),
            limits.cut_off_rise,
        ),
        _check_share(
            "answers_repeated",
            "of phrases repeat themselves",
            fmean(answer.repeated_ratio for answer in mine),
            fmean(answer.repeated_ratio for answer in theirs),
            limits.repeated_rise,
        ),
        _check_length(mine, theirs, limits.length_ratio),
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


def _length_ratio(answers: Sequence[Written]) -> float | None:
    ratios = [
        max(answer.words, 1) / max(answer.good_words, 1)
        for answer in answers
        if answer.good_words is not None
    ]
    return median(ratios) if ratios else None


def _compare(gains: Sequence[float], smallest: float, significance: float) -> tuple[Decision, str]:
    return _judge(
        fmean(gains),
        sign_flip_p_value(gains),
        sign_flip_p_value([-gain for gain in gains]),
        smallest,
        significance,
        units=len(gains),
    )


def _judge(
    difference: float,
    better_p: float,
    worse_p: float,
    smallest: float,
    significance: float,
    units: int | None = None,
) -> tuple[Decision, str]:
    over = "" if units is None else f" over {units} prompt{'' if units == 1 else 's'}"
    if difference >= smallest and better_p <= significance:
        return Decision.PASS, f"better{over} (p = {better_p:.2g})"
    if difference <= -smallest and worse_p <= significance:
        return Decision.FAIL, f"worse{over} (p = {worse_p:.2g})"
    if units is not None and 0.5**units > significance:
        needed = math.ceil(-math.log2(significance))
        found = f"{units} prompt{'' if units == 1 else 's'}"
        return Decision.INCONCLUSIVE, f"{found} can't tell, at least {needed} are needed"
    if abs(difference) < smallest:
        return Decision.INCONCLUSIVE, f"a difference too small to count{over}"
    return Decision.INCONCLUSIVE, f"chance isn't excluded{over} (p = {min(better_p, worse_p):.2g})"


def _by_unit(values: Sequence[tuple[str, float]]) -> list[float]:
    """One mean per unit, in an order that doesn't depend on that of the rows."""
    units: defaultdict[str, list[float]] = defaultdict(list)
    for unit, value in values:
        units[unit].append(value)
    return [math.fsum(units[unit]) / len(units[unit]) for unit in sorted(units)]


def _means(rows: Sequence[Paired]) -> tuple[float, float]:
    return fmean(row.candidate for row in rows), fmean(row.baseline for row in rows)
