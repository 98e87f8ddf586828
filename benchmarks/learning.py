"""How well tuning meets a hidden wish of a crowd, by number of judgements and by recipe.

`python -P benchmarks/learning.py --needed --general-text FILE… [--work .learning]`

Forty simulated people share one wish and judge what production says at temperature 1: thumbs,
comparisons and corrections, one in ten turned round. `burnish serve` records, freezes, tunes,
evaluates and promotes, through the official API alone; then held-out prompts about other subjects
are asked greedily. Each cell (wish, kinds, size, seed, recipe) is a line of the file of results,
and a run goes on where the last one ended. What it costs elsewhere is the change of the negative
log-likelihood of `--general-text`, plain text that nothing was trained on.

It is in work: cells were run from end to end on the real engine for trial, those that the project
needs are still to be run, and the base's rates behind the choice of wishes are provisional.
"""

from __future__ import annotations

import argparse
import signal
import sys
from itertools import product
from pathlib import Path

from benchmarks.crowd import report
from benchmarks.crowd.people import PEOPLE, SIZES, Kinds
from benchmarks.crowd.prompts import HELD_OUT
from benchmarks.crowd.results import Cell, list_needed, list_open, read_results, wilson
from benchmarks.crowd.running import Bench, outcomes, say
from benchmarks.crowd.wishes import REPORTED, TUNING, WISHES
from tuner.methods import HYPERPARAMETERS, Method

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"


def base_rates(bench: Bench) -> str:
    """How often the untuned base meets each wish, as Markdown."""
    answers = [*bench.base_answers().values()]
    lines = [f"| wish | sort | base, of {len(HELD_OUT)} | 95 % | used |", "|---|---|---:|---|---|"]
    for wish in WISHES:
        found = outcomes(wish, answers)
        low, high = wilson(found["met"], found["asked"])
        used = "reported" if wish.name in REPORTED else "tuning" if wish.name in TUNING else ""
        rate = found["met"] / found["asked"]
        lines.append(
            f"| {wish.name}: {wish.says} | {wish.sort} | {rate:.0%} | {low:.0%} to {high:.0%} "
            f"| {used} |"
        )
    return "\n".join(lines) + "\n"


def read_setting(text: str) -> tuple[str, float]:
    """`learning_rate=1e-3`; the API has the last word on ranges."""
    name, _, value = text.partition("=")
    if name not in HYPERPARAMETERS:
        known = ", ".join(HYPERPARAMETERS)
        raise argparse.ArgumentTypeError(f"{name!r} is no hyperparameter; known: {known}")
    return name, HYPERPARAMETERS[name].type(value)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-rates", action="store_true", help="how often the base meets each")
    parser.add_argument("--needed", action="store_true", help="all cells that the project shows")
    parser.add_argument("--list", action="store_true", help="name the open cells and run none")
    parser.add_argument("--again", action="store_true", help="run cells that have a result too")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    parser.add_argument("--plot", type=Path, help="a folder for the two SVGs, such as docs")
    parser.add_argument("--general-text", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--work", type=Path, default=Path(".learning"), help="data directories")
    parser.add_argument("--results", type=Path, default=RESULTS)
    one = parser.add_argument_group("cells of one's own: every combination of these")
    one.add_argument("--wish", nargs="+", choices=[wish.name for wish in WISHES], default=[])
    one.add_argument("--kinds", nargs="+", choices=[*Kinds], default=[Kinds.MIXED])
    one.add_argument("--people", type=int, default=PEOPLE)
    one.add_argument("--size", type=int, nargs="+", choices=SIZES, default=[200])
    one.add_argument("--seed", type=int, nargs="+", default=[1])
    one.add_argument("--method", nargs="+", choices=tuple(Method), default=[Method.SUPERVISED])
    one.add_argument("--set", nargs="+", type=read_setting, default=[], metavar="NAME=VALUE")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service ends with it
    bench = Bench(options.work, options.results, options.general_text)
    cells = list_needed() if options.needed else []
    crowds = product(options.wish, options.kinds, options.seed)
    cells += [
        Cell(wish, kinds, options.people, size, seed, method, dict(options.set))
        for wish, kinds, seed in crowds
        for size, method in product(options.size, options.method)
    ]
    if options.base_rates:
        print(base_rates(bench))
    todo = list_open(cells, read_results(options.results), again=options.again)
    if options.list:
        print("\n".join(map(str, todo)))
    elif todo:
        say(f"{len(todo)} of {len(cells)} cells are open")
        if not bench.general:
            say("no --general-text: the rows will say nothing of what is forgotten")
        bench.run(todo)
    rows = read_results(options.results)
    if options.table:
        print(report.table(rows))
    if options.plot is not None:
        (options.plot / "learning.svg").write_text(report.plot_sizes(rows), encoding="utf-8")
        frontier = report.plot_frontier(rows)
        (options.plot / "learning-frontier.svg").write_text(frontier, encoding="utf-8")


if __name__ == "__main__":
    main()
