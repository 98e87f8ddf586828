"""The order of an epoch: whole, repeatable, every kind of example in its share of every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.formats.shapes import Kind
from tuner.training.order import epoch_order

KINDS: tuple[Kind, ...] = ("supervised", "preference", "labelled")


def kinds_of(*counts: int) -> list[Kind]:
    return [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]


@pytest.mark.parametrize("counts", [(20, 0, 0), (7, 4, 9)])
def test_the_order_of_an_epoch_follows_from_seed_and_epoch(counts: tuple[int, int, int]) -> None:
    kinds = kinds_of(*counts)
    orders = {
        (seed, epoch): epoch_order(kinds, 4, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert epoch_order(kinds, 4, seed=1, epoch=1) == orders[1, 1]


@given(st.tuples(*[st.integers(0, 60)] * 3), st.integers(1, 20), st.integers(0, 3))
def test_every_step_has_every_kind_by_its_share(
    counts: tuple[int, int, int], batch_size: int, seed: int
) -> None:
    kinds = kinds_of(*counts)
    order = epoch_order(kinds, batch_size, seed=seed, epoch=0)
    assert sorted(order) == list(range(len(kinds)))
    for first in range(0, len(kinds), batch_size):
        step = order[first : first + batch_size]
        for kind, count in zip(KINDS, counts, strict=True):
            found = sum(kinds[number] == kind for number in step)
            # |found - share| <= 1, in whole numbers
            assert abs(found * len(kinds) - len(step) * count) <= len(kinds)
