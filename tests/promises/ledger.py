"""The ledger of promises: what each test of a promise found, beside the commit that it ran on.

Owns: one line of JSON for each run of a test, what of it need not be run again, and the table of it
all. Does not own: which tests there are and when they run (`tests/promise_fixtures.py`).
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / ".promises" / "results.jsonl"

Figure = int | float | str


@dataclass(frozen=True, slots=True)
class Code:
    """The state of the source that a result is of."""

    commit: str  #: the whole hash; empty where there is no repository
    dirty: bool  #: something differs from the commit

    @property
    def is_known(self) -> bool:
        """Whether two runs on this state are runs of the same source."""
        return bool(self.commit) and not self.dirty

    @property
    def short(self) -> str:
        return f"{self.commit[:8] or 'unknown'}{'+' if self.dirty else ''}"


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of one test found."""

    promise: int | None
    test: str  #: pytest's name of it
    outcome: str  #: `kept`, `broken` or `skipped`
    figures: Mapping[str, Figure]
    seconds: float
    commit: str
    dirty: bool
    full: bool  #: with the full number of repetitions
    at: str  #: UTC, ISO 8601

    @property
    def code(self) -> Code:
        return Code(self.commit, self.dirty)


def promise_of(test: str) -> int | None:
    """The promise that a test is of: the number in its file's name."""
    found = re.search(r"(?:^|/)test_(\d+)_[^/]*\.py(?:::|$)", test)
    return int(found[1]) if found else None


def look_at_code() -> Code:
    """The commit that is checked out, and whether anything differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return Code(commit, dirty=bool(git("status", "--porcelain")))
    except FileNotFoundError:  # no git here
        return Code("", dirty=True)


def append(path: Path, result: Result) -> None:
    """Add a result to the ledger, with one write."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def read(path: Path) -> list[Result]:
    """All results, oldest first; a line that was cut off when its run was killed is passed over."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return results


def have_run(results: Iterable[Result], code: Code) -> set[str]:
    """The tests whose full run on this very source is in the ledger and needs no other."""
    if not code.is_known:
        return set()
    latest = _latest(results)
    return {
        test
        for test, found in latest.items()
        if found.code == code and found.outcome in ("kept", "broken")
    }


def are_broken(results: Iterable[Result], tests: Iterable[str], code: Code) -> list[str]:
    """Those of `tests` whose latest full run is of this source and failed."""
    latest = _latest(results)
    return [
        test
        for test in tests
        if test in latest and latest[test].code == code and latest[test].outcome == "broken"
    ]


def build_table(results: Iterable[Result], tests: Sequence[str]) -> list[str]:
    """A row for each promise: kept, broken, or not run; figures, commit and seconds.

    A promise is kept when the latest full run of each of its tests has kept it, whatever commit
    that was of: the commit stands beside it, with a `+` where something differed from it.
    """
    latest = _latest(results)
    by_promise: dict[int | None, list[str]] = {}
    for test in tests:
        by_promise.setdefault(promise_of(test), []).append(test)
    lines = [f"{'promise':>7}  {'':<8}  {'commit':<9}  {'seconds':>7}  figures"]
    for promise in sorted(by_promise, key=lambda number: (number is None, number)):
        names = by_promise[promise]
        found = [latest[name] for name in names if name in latest]
        commits = ", ".join(dict.fromkeys(result.code.short for result in found))
        seconds = f"{sum(result.seconds for result in found):.0f}" if found else ""
        said = "; ".join(say(result.figures) for result in found if result.figures)
        first = (
            f"{'-' if promise is None else promise:>7}  {_state(found, len(names)):<8}  "
            f"{commits:<9}  {seconds:>7}  "
        )
        rows = textwrap.wrap(said, 100) or [""]
        lines += [(first + rows[0]).rstrip(), *(" " * 39 + row for row in rows[1:])]
    return lines


def say(figures: Mapping[str, Figure]) -> str:
    """Figures as they are printed: `kills 200, lost 0`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())


def _state(found: Sequence[Result], tests: int) -> str:
    if any(result.outcome == "broken" for result in found):
        return "broken"
    kept = sum(result.outcome == "kept" for result in found)
    return "kept" if kept == tests else "in part" if kept else "not run"


def _latest(results: Iterable[Result]) -> dict[str, Result]:
    return {result.test: result for result in results if result.full}
