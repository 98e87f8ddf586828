"""How tests of promises hand over their figures, and how `make promises` goes on where it stopped.

Every run of a test with the marker `promises` adds a line to the ledger (`promises/ledger.py`).
`--promises-go-on` leaves out what has a full result of the same commit, `--promises-only` runs the
named ones alone; a run with the full number of repetitions ends with the table of the ledger.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import pytest

from tests.promises import ledger
from tests.promises.ledger import Code, Figure, Result, promise_of
from tests.promises.scale import is_full

OUTCOMES = {"passed": "kept", "failed": "broken", "skipped": "skipped"}


class Figures:
    """Keeps the figures of one test for the ledger, and prints them."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def __call__(self, **figures: Figure) -> None:
        """Keep `name=value`; a unit stands in the name (`_seconds`, `_ms`, `_mib`)."""
        self._item.user_properties.extend((f"figure {name}", figures[name]) for name in figures)
        number = promise_of(self._item.nodeid)
        sys.stdout.write(f"{number if number is not None else '-'}: {ledger.say(figures)}\n")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Hands figures over: `figures(kills=200, lost=0)`."""
    return Figures(request.node)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("promises")
    group.addoption(
        "--promises-go-on",
        action="store_true",
        help="leave out the tests of promises that have a full result of this commit",
    )
    group.addoption("--promises-only", metavar="NUMBERS", help="run these promises alone: '1 31'")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's processes report to the one above them
        config.pluginmanager.register(Bookkeeper(config))


class Bookkeeper:
    """Chooses which tests of promises run, and keeps what they found."""

    def __init__(self, config: pytest.Config) -> None:
        self._go_on: bool = config.getoption("promises_go_on")
        self._only = {int(number) for number in (config.getoption("promises_only") or "").split()}
        self._tests: list[str] = []
        self._found_code: Code | None = None

    @property
    def _code(self) -> Code:
        if self._found_code is None:
            self._found_code = ledger.look_at_code()
        return self._found_code

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        promises = [item for item in items if item.get_closest_marker("promises")]
        self._tests = [item.nodeid for item in promises]
        done = ledger.have_run(ledger.read(ledger.LEDGER), self._code) if self._go_on else set()
        left_out = [
            item
            for item in promises
            if item.nodeid in done or (self._only and promise_of(item.nodeid) not in self._only)
        ]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Before and after the test itself a report is of interest only when it says that it failed
        # or never ran.
        if "promises" not in report.keywords or (report.when != "call" and report.passed):
            return
        figures = {
            name.removeprefix("figure "): value
            for name, value in report.user_properties
            if name.startswith("figure ")
        }
        result = Result(
            promise=promise_of(report.nodeid),
            test=report.nodeid,
            outcome=OUTCOMES[report.outcome],
            figures=figures,
            seconds=round(report.duration, 2),
            commit=self._code.commit,
            dirty=self._code.dirty,
            full=is_full(),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        ledger.append(ledger.LEDGER, result)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """What was left out counts: for the exit status, and where nothing was left to run."""
        if not self._go_on or exitstatus not in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            return
        broken = ledger.are_broken(ledger.read(ledger.LEDGER), self._tests, self._code)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if broken else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if is_full() and self._tests:
            terminalreporter.section(f"promises, at {self._code.short}")
            for line in ledger.build_table(ledger.read(ledger.LEDGER), self._tests):
                terminalreporter.write_line(line)
