"""What labelled examples need of each other: mismatched answers, and the weights of both labels.

Owns: which example's answer stands behind another's prompt, from which KTO estimates how far the
model has moved on the whole; and the balance of answers labelled true and false. Both depend on the
examples alone, so a resumed run has the same. Does not own: the loss (`losses.py`), or the estimate
(`objective.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuner.training.config import TrainingConfig
from tuner.training.rendering import RenderedExample

MOST_DESIRABLE = 4 / 3
"""Largest weight of all answers labelled true, as a multiple of those labelled false."""


def mismatch(
    examples: Sequence[RenderedExample], *, max_length: int
) -> Mapping[str, RenderedExample]:
    """Each labelled example's prompt with another's answer, by the content hash of the example.

    The other is the next one in the order of content hashes that begins with another user turn
    (`group`); the first one follows on the last. Its answer is cut where it would pass
    `max_length`. An example without such another one has no entry.
    """
    labelled = {one.content_hash: one for one in examples if one.kind == "labelled"}
    ordered = [labelled[key] for key in sorted(labelled)]
    found: dict[str, RenderedExample] = {}
    other: RenderedExample | None = None
    # Backwards and twice around: what follows a run of one group serves all of the run.
    for index in reversed(range(2 * len(ordered))):
        one, following = (ordered[at % len(ordered)] for at in (index, index + 1))
        if following.group != one.group:
            other = following
        if other is not None:
            answer = other.completions[0][: max_length - len(one.prompt)]
            found[one.content_hash] = replace(one, completions=(answer,), label=None)
    return found


def class_weights(
    config: TrainingConfig, examples: Sequence[RenderedExample]
) -> tuple[float, float]:
    """KTO's `desirable_weight` and `undesirable_weight`, from the examples where they aren't set.

    The answers labelled true get 1 to 4/3 times the weight of those labelled false, all together
    (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306), and the mean over all of them is 1,
    so that rare labels change neither the learning rate's meaning nor the share of other kinds of
    example. With one label alone both are 1.
    """
    true, false = (
        math.fsum(one.weight for one in examples if one.kind == "labelled" and one.label is label)
        for label in (True, False)
    )
    desirable = undesirable = 1.0
    if true and false:
        ratio = min(max(true / false, 1.0), MOST_DESIRABLE)
        undesirable = (true + false) / (false * (1 + ratio))
        desirable = ratio * undesirable * false / true
    return (
        desirable if config.desirable_weight is None else config.desirable_weight,
        undesirable if config.undesirable_weight is None else config.undesirable_weight,
    )
