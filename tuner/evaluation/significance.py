"""Permutation tests, exact where that is cheap, and Holm's adjustment of several p-values.

Pure; assumes nothing about how figures are distributed. Does not own what is tested or what follows
from it (`gate.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_EXACT_UNITS = 14  # 2**14 sign patterns
_EXACT_SPLITS = 20_000  # label assignments
_DRAWS = 20_000


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
        splits = np.array(list(combinations(range(values.size), k)))
        sums = values[splits].sum(axis=1)
        return float(np.mean(sums >= observed - slack))
    random = np.random.default_rng(0)
    sums = np.array([random.permutation(values)[:k].sum() for _ in range(_DRAWS)])
    return float((np.count_nonzero(sums >= observed - slack) + 1) / (_DRAWS + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Holm 1979).

    Calling those at or below a level significant has at most that chance of any false one,
    however the tests hang together.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted
