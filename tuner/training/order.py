"""The order of examples in an epoch: shuffled, with every kind dealt evenly over the steps.

Owns: that order, a pure function of seed, epoch and the examples' kinds. Does not own: the steps
(`loop.py`), or how the examples of a step are put into forward passes (`layout.py`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from feedback.formats.shapes import Kind


def epoch_order(kinds: Sequence[Kind], batch_size: int, *, seed: int, epoch: int) -> list[int]:
    """The numbers of the examples, whose `kinds` these are, in the order of an epoch.

    Each `batch_size` of them are a step. In every step the number of examples of a kind differs by
    at most one from its share.
    """
    shuffled = list(range(len(kinds)))
    random.Random(f"{seed}:{epoch}").shuffle(shuffled)
    counts = Counter(kinds[number] for number in shuffled)
    if len(counts) < 2:
        return shuffled
    left = {kind: iter([at for at in shuffled if kinds[at] == kind]) for kind in sorted(counts)}
    return [
        next(left[kind])
        for step in _deal(counts, batch_size)
        for kind, count in step.items()
        for _ in range(count)
    ]


def _deal(counts: Mapping[Kind, int], batch_size: int) -> Iterator[dict[Kind, int]]:
    """How many of each kind every step takes.

    A step takes the whole part of each kind's share, and one more of some kinds. Which of them: it
    is the scheduling of periodic tasks whose weights are the fractions that are left, and the
    earliest deadline first keeps every kind within one of its share from the first step on (Pfair
    scheduling, Baruah et al. 1996; exact for up to three kinds, Anderson and Srinivasan 2000).
    """
    total = sum(counts.values())
    left = {kind: counts[kind] for kind in sorted(counts)}
    shares = {kind: Fraction(batch_size * count, total) for kind, count in left.items()}
    extras = dict.fromkeys(left, 0)
    for step in range(total // batch_size):
        taken = {kind: int(share) for kind, share in shares.items()}
        open_ = []
        for kind, share in shares.items():
            fraction = share - int(share)
            # The kind's next extra may come from here on, and has to come before its deadline.
            if fraction and int(extras[kind] / fraction) <= step:
                open_.append((-(-(extras[kind] + 1) // fraction), kind))
        for _, kind in sorted(open_)[: batch_size - sum(taken.values())]:
            taken[kind] += 1
            extras[kind] += 1
        for kind, count in taken.items():
            left[kind] -= count
        yield taken
    yield left
