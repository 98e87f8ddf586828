"""The cells of the learning benchmark and the file of their results, one JSON line each.

Owns: what names a cell, which cells the project needs, reading and writing, and the statistics of
shares. Does not own: how a cell is run (`learning.py`) or shown (`report.py`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.crowd.people import PEOPLE, SIZES, Kinds
from benchmarks.crowd.wishes import REPORTED
from tuner.methods import Method

Row = dict[str, Any]
BASE: Final = "base"  #: the method of the rows that say what the untuned base does


@dataclass(frozen=True)
class Cell:
    """One run: who judged how much, and how the model was tuned on it."""

    wish: str
    kinds: str = Kinds.MIXED
    people: int = PEOPLE
    size: int = 200
    seed: int = 1
    method: str = Method.COMBINED
    settings: Mapping[str, float] = field(default_factory=dict)  #: that differ from the defaults

    @property
    def key(self) -> str:
        """Names the cell."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def sequence(self) -> str:
        """Names the crowd whose judgements it takes the first of; a folder's name."""
        return f"{self.wish}-{self.kinds}-{self.people}-{self.seed}"

    @property
    def recipe(self) -> str:
        changed = [f"{name} {value:g}" for name, value in sorted(self.settings.items())]
        return ", ".join([self.method, *changed])

    def __str__(self) -> str:
        people = "" if self.people == PEOPLE else f" by {self.people}"
        return f"{self.wish}, {self.size} {self.kinds}{people}, seed {self.seed}, {self.recipe}"


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a row of results."""
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def list_needed(methods: Sequence[str] = tuple(Method)) -> list[Cell]:
    """What the project shows, the most telling first; cells of one crowd stand together.

    `combined` at 200 judgements, then at the other sizes; one kind alone; one person; more seeds;
    and the other methods at 200. Methods that there aren't are left out.
    """
    main = Method.COMBINED
    found: list[Cell] = []
    for wish in REPORTED:
        sizes = sorted(SIZES, key=lambda size: size != 200)
        found += [Cell(wish, size=size, method=main) for size in sizes]
        found += [Cell(wish, method=method) for method in Method if method != main]
    for kinds in (Kinds.THUMBS, Kinds.COMPARISONS):
        found += [Cell(wish, kinds, method=main) for wish in REPORTED]
    found += [Cell(wish, Kinds.CORRECTIONS, 1, 20, method=main) for wish in REPORTED]
    found += [Cell(wish, seed=seed, method=main) for seed in (2, 3) for wish in REPORTED]
    return [cell for cell in found if cell.method in methods]


# The file


def read_results(path: Path) -> dict[str, Row]:
    """The rows by their cells. Raises ValueError for a line that is none, with its number."""
    found: dict[str, Row] = {}
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[cell_of(row).key] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no result: {error!r}") from None
    return found


def write_result(path: Path, row: Row) -> None:
    """Put a row into the file, in the place of an older one of its cell; whole or not at all."""
    rows = {**read_results(path), cell_of(row).key: row}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    lines = (json.dumps(each, ensure_ascii=False) for each in rows.values())
    fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(fresh, path)


def list_open(cells: Iterable[Cell], rows: Mapping[str, Row], *, again: bool) -> list[Cell]:
    """The cells to run, each once: those without a row, or all of them."""
    unique = {cell.key: cell for cell in cells}
    return [cell for key, cell in unique.items() if again or key not in rows]


# Statistics


def wilson(met: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); 0 to 1 where nobody was asked."""
    if asked == 0:
        return 0.0, 1.0
    share, scale = met / asked, 1 + z * z / asked
    middle = share + z * z / (2 * asked)
    reach = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def mcnemar(first: str, second: str) -> float:
    """The exact two-sided p that paired outcomes differ by chance (McNemar 1947).

    Outcomes are strings of 0 and 1, one for each prompt. Raises ValueError for unequal lengths.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost = pairs.count(("0", "1")), pairs.count(("1", "0"))
    differ, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(differ, count) for count in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**differ))
