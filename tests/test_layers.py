"""What `make test` says of a machine, of its layers and at its end."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import layers
from tests.layers import LAYERS, Need, Outcome, build_summary, count, find_missing

SUITE = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'


@pytest.mark.parametrize(
    ("report", "status", "counts"),
    [
        (SUITE.format(9, 0, 0, 2), 0, (7, 0, 2)),
        (SUITE.format(9, 1, 2, 0), 1, (6, 3, 0)),
        (SUITE.format(0, 0, 0, 0), 5, (0, 1, 0)),  # nothing was collected: that is a fault
        (SUITE.format(3, 0, 0, 0), 2, (3, 1, 0)),  # a file could not be imported
        ("", -9, (0, 1, 0)),  # it was killed, and left no report
        ("<testsuites><testsu", 1, (0, 1, 0)),
    ],
)
def test_a_layer_is_counted_and_never_better_than_its_exit_status(
    report: str, status: int, counts: tuple[int, int, int]
) -> None:
    assert count(report, status) == counts


def test_the_summary_has_every_layer_and_ends_with_one_line() -> None:
    outcomes = [Outcome("fast", 900, 0, 3, 125.4), Outcome("promises", 40, 2, 1, 61.0)]
    heading, *rows, blank, last = build_summary(outcomes, ["fast", "promises", "loop"])
    assert heading.split() == ["layer", "passed", "failed", "skipped", "time"]
    assert [row.split() for row in rows] == [
        ["fast", "900", "0", "3", "2:05"],
        ["promises", "40", "2", "1", "1:01"],
        ["loop", "not", "run"],
    ]
    assert (blank, last) == ("", "940 passed, 2 failed, 4 skipped")


def test_what_is_missing_is_what_a_layer_that_runs_needs() -> None:
    there = Need("a", "", ["fast"], lambda: True)
    gone = Need("b", "", ["fast", "loop"], lambda: False)
    other = Need("c", "", ["clients"], lambda: False)
    assert find_missing([there, gone, other], ["fast", "training"]) == [gone]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that were run, of which the second fails; nothing else is done."""
    found: list[str] = []

    def run_layer(layer: str) -> Outcome:
        found.append(layer)
        return Outcome(layer, 1, int(layer == "training"), 0, 0.0)

    monkeypatch.setattr(layers, "prepare", lambda layers: None)
    monkeypatch.setattr(layers, "make_environment", lambda: True)
    monkeypatch.setattr(layers, "run_layer", run_layer)
    return found


@pytest.mark.parametrize(
    ("arguments", "expected", "status"),
    [([], list(LAYERS), 1), (["fast", "loop"], ["fast", "loop"], 0)],
)
def test_every_layer_runs_though_an_earlier_one_failed(
    ran: list[str],
    arguments: Sequence[str],
    expected: list[str],
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert layers.main(arguments) == status
    assert ran == expected
    total = f"{len(expected)} passed, {status} failed, 0 skipped"
    assert capsys.readouterr().out.splitlines()[-1] == total


def test_one_that_was_stopped_shows_what_ran_and_fails(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_layer = layers.run_layer

    def stopped(layer: str) -> Outcome:
        if layer == "loop":
            raise KeyboardInterrupt
        return run_layer(layer)

    monkeypatch.setattr(layers, "run_layer", stopped)
    assert layers.main(["fast", "loop"]) == 1
    assert "loop       not run" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bootstrap.py", "tests/layers.py"])
def test_what_runs_before_there_is_an_environment_is_read_by_an_old_python(name: str) -> None:
    source = (layers.ROOT / name).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {module.partition(".")[0] for module in imported} <= sys.stdlib_module_names


def test_a_layer_that_is_not_there_is_named_with_those_that_are() -> None:
    script = str(Path(layers.__file__))
    done = subprocess.run(
        [sys.executable, "-P", script, "fats"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no layer 'fats': expected one of fast, processes, training" in done.stderr
