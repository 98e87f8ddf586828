"""The table and the two plots of the learning benchmark, out of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.crowd.people import PEOPLE, SIZES, Kinds
from benchmarks.crowd.results import BASE, Cell, Row, cell_of, mcnemar, wilson

COLOURS = ("#1a73e8", "#c5221f", "#188038", "#e8710a", "#9334e6", "#5f6368")
LEFT, TOP, WIDTH, HEIGHT, LEGEND = 60, 40, 420, 260, 260

Point = tuple[float, float]


def table(rows: Mapping[str, Row]) -> str:
    """All cells as Markdown: the share met with its interval, beside the base and what it cost."""
    lines = [
        "| wish | judged | by | seed | recipe | base | met | 95 % | p | general NLL | KL | gate "
        "| train |",
        "|---|---|---:|---:|---|---:|---:|---|---:|---:|---:|---|---:|",
    ]
    bases = {row["wish"]: row for row in rows.values() if row["method"] == BASE}
    tuned = [row for row in rows.values() if row["method"] != BASE]
    for row in sorted(tuned, key=_order):
        cell, base = cell_of(row), bases.get(row["wish"])
        low, high = wilson(row["met"], row["asked"])
        against = f"{share(base):.0%}" if base else "–"
        chance = f"{mcnemar(base['outcomes'], row['outcomes']):.2g}" if base else "–"
        cost, far = row.get("general_nll_change"), row.get("kl")
        lines.append(
            f"| {cell.wish} | {cell.size} {cell.kinds} | {cell.people} | {cell.seed} "
            f"| {cell.recipe} | {against} | {share(row):.0%} | {low:.0%} to {high:.0%} | {chance} "
            f"| {'–' if cost is None else f'{cost:+.1%}'} | {'–' if far is None else f'{far:.3f}'} "
            f"| {row['decision'] or 'error'} | {row['training_seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def _order(row: Row) -> tuple[Any, ...]:
    cell = cell_of(row)
    return cell.recipe, cell.kinds, -cell.people, cell.wish, cell.size, cell.seed


def share(row: Mapping[str, Any]) -> float:
    return float(row["met"] / row["asked"])


def by_size(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Mean share met over wishes and seeds by number of judgements, of mixed kinds, by recipe.

    A mean is of the wishes that have been measured at that size.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        cell = cell_of(row)
        if cell.kinds == Kinds.MIXED and cell.people == PEOPLE and cell.method != BASE:
            found.setdefault(cell.recipe, {}).setdefault(cell.size, []).append(share(row))
    return {
        recipe: [(float(size), mean(shares)) for size, shares in sorted(sizes.items())]
        for recipe, sizes in sorted(found.items())
    }


def frontier(rows: Iterable[Row], size: int = 200) -> dict[str, list[Point]]:
    """Change of the general NLL and share met, by recipe, means over wishes at `size`."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        cell: Cell = cell_of(row)
        cost = row.get("general_nll_change")
        if cell.size == size and cell.kinds == Kinds.MIXED and cost is not None:
            found.setdefault(cell.recipe, []).append((cost, share(row)))
    return {
        recipe: [(mean(x for x, _ in points), mean(y for _, y in points))]
        for recipe, points in sorted(found.items())
    }


def plot_sizes(rows: Mapping[str, Row]) -> str:
    """Share met against the number of judgements, one line for each recipe, and the base's rate."""
    shares = [share(row) for row in rows.values() if row["method"] == BASE]
    base = mean(shares) if shares else None
    low, high = math.log(SIZES[0]), math.log(SIZES[-1])

    def across(size: float) -> float:
        return (math.log(size) - low) / (high - low)

    ticks = [(across(size), f"{size}") for size in SIZES]
    title = "Held-out answers that meet the wish, by number of judgements (mean over wishes)"
    lines = {
        name: [(across(x), y) for x, y in points] for name, points in by_size(rows.values()).items()
    }
    return _plot(title, ticks, lines, base)


def plot_frontier(rows: Mapping[str, Row]) -> str:
    """Share met against the change of the general NLL, one dot for each recipe."""
    found = frontier(rows.values())
    most = max([0.03, *(abs(x) for points in found.values() for x, _ in points)]) * 1.1
    steps = 5
    ticks = [(step / steps, f"{most * step / steps:+.1%}") for step in range(steps + 1)]
    dots = {name: [(max(x, 0.0) / most, y) for x, y in points] for name, points in found.items()}
    return _plot("Share met, by change of general NLL (200 mixed judgements)", ticks, dots, None)


def _plot(
    title: str,
    ticks: Sequence[tuple[float, str]],
    lines: Mapping[str, Sequence[Point]],
    base: float | None,
) -> str:
    """An SVG of lines through points in the unit square."""
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + LEGEND} {bottom + 40}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{title}</text>',
    ]
    for step in range(5):
        at = bottom - HEIGHT * step / 4
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{step / 4:.0%}</text>'
        )
    for x, label in ticks:
        parts.append(
            f'<text x="{LEFT + WIDTH * x:.1f}" y="{bottom + 18}" text-anchor="middle">'
            f"{label}</text>"
        )
    if base is not None:
        at = bottom - HEIGHT * base
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#5f6368" '
            f'stroke-dasharray="4 3"/><text x="{right + 6}" y="{at + 4:.1f}">base {base:.0%}</text>'
        )
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(LEFT + WIDTH * x, bottom - HEIGHT * y, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for x, y, value in places:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                f"<title>{name}: {value:.0%}</title></circle>"
            )
        at = TOP + 8 + number * 16
        parts.append(
            f'<rect x="{right + 60}" y="{at - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{right + 76}" y="{at}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
