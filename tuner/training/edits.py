"""Which tokens of a better answer somebody changed, so that learning can attend to these.

Owns: the comparison of two answers' tokens. Does not own: what a token that was left as it was
weighs (`TrainingConfig.copied_weight`, `objective.py`).

A correction repeats most of the answer that it corrects. The repeated tokens are the model's own
sample and say nothing of what was wrong with it. With all tokens weighing the same they are most of
the loss: the adapter learns answers by heart, and the change, a few tokens of a hundred, hardly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rapidfuzz.distance import Indel

SHORTEST_COPY: Final = 3
"""Fewer equal tokens in a row between two changes are a coincidence, and count as changed."""


def mark_changes(before: Sequence[int], after: Sequence[int]) -> tuple[bool, ...]:
    """For each token of `after`: whether it is more than a copy from `before`.

    Changed are the tokens that the shortest edit from `before` to `after` inserts, the token that
    comes where others were left out (it was preferred to them), and the last one: to end there is a
    decision too. Quick for long answers (Hyyrö 2004, as in rapidfuzz).
    """
    changed = [True] * len(after)
    edits: set[str] = set()  #: since the last stretch that is equal in both
    for step in Indel.opcodes(before, after):
        if step.tag != "equal":
            edits.add(step.tag)
            continue
        begins, ends = step.dest_start, step.dest_end
        inside = begins > 0 and ends < len(after)
        if not inside or ends - begins >= SHORTEST_COPY:
            # Where something was only left out, the token that follows stands in its place.
            begins += edits == {"delete"}
            changed[begins:ends] = [False] * (ends - begins)
        edits.clear()
    if changed:
        changed[-1] = True
    return tuple(changed)
