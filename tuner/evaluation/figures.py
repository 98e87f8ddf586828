"""The figures that the gate decides from.

Owns: their types and units. Does not own: how they are gathered (`measurement.py`) or judged
(`gate.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
class Moved:
    """How far a release is from the base: `KL(base ‖ release)`, nats per token."""

    kl: float
    error: float  #: its standard error


@dataclass(frozen=True, slots=True)
class General:
    """What one release makes of what nobody taught it; None where it couldn't be measured."""

    nll: float | None = None  #: of plain text, nats per token
    tokens: int = 0  #: of that text
    moved: Moved | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """All that the gate looks at. Every part may be empty."""

    nll: Sequence[Paired] = ()  #: supervised rows: mean NLL of the completion, nats per token
    chosen_nll: Sequence[Paired] = ()  #: preference rows: the same of the chosen answer
    margins: Sequence[Paired] = ()  #: preference rows: log-probability margin over the base's, nats
    labelled: Sequence[Labelled] = ()
    candidate_answers: Sequence[Written] = ()
    baseline_answers: Sequence[Written] = ()
    candidate_general: General = General()
    baseline_general: General = General()
    base_general: General = General()
    candidate_deleted: Sequence[str] = ()  #: files that it learned from and nobody can look into
    baseline_deleted: Sequence[str] = ()
