"""The ledger of promises: figures, what need not be run again, and the table at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.promises import ledger
from tests.promises.ledger import Code, Result, build_table, have_run, promise_of

pytest_plugins = ["pytester"]

NOW, BEFORE = Code("a1b2c3d4" + "0" * 32, dirty=False), Code("9" * 40, dirty=False)
KEPT = Result(
    promise=1,
    test="tests/promises/test_01_none_is_lost.py::test_kills",
    outcome="kept",
    figures={"kills": 200, "lost": 0},
    seconds=61.4,
    commit=NOW.commit,
    dirty=False,
    full=True,
    at="2026-01-01T00:00:00+00:00",
)
OTHER = replace(KEPT, promise=31, test="tests/promises/test_31_faults.py::test_locks[sqlite]")


@pytest.mark.parametrize(
    ("test", "promise"),
    [
        (KEPT.test, 1),
        (OTHER.test, 31),
        ("tests/promises/test_100_more.py", 100),
        ("tests/clients/test_clients.py::test_31_of_them", None),
        ("tests/promises/test_2nd_try.py::test_it", None),
    ],
)
def test_the_file_names_the_promise(test: str, promise: int | None) -> None:
    assert promise_of(test) == promise


def test_what_was_appended_is_read_and_a_line_cut_off_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "results" / "results.jsonl"
    assert ledger.read(path) == []
    ledger.append(path, KEPT)
    with path.open("a") as file:
        file.write('{"promise": 2, "te\n')
    ledger.append(path, OTHER)
    assert ledger.read(path) == [KEPT, OTHER]


@pytest.mark.parametrize(
    ("result", "code", "is_done"),
    [
        (KEPT, NOW, True),
        (replace(KEPT, outcome="broken"), NOW, True),
        (replace(KEPT, outcome="skipped"), NOW, False),
        (replace(KEPT, full=False), NOW, False),
        (KEPT, BEFORE, False),
        (replace(KEPT, dirty=True), replace(NOW, dirty=True), False),
        (replace(KEPT, commit=""), Code("", dirty=False), False),
    ],
)
def test_a_full_result_of_the_very_same_source_need_not_be_run_again(
    result: Result, code: Code, is_done: bool
) -> None:
    assert have_run([result], code) == ({result.test} if is_done else set())


def test_the_table_has_the_latest_full_run_of_each_test_beside_its_commit() -> None:
    never = "tests/promises/test_02_no_judgement_is_lost.py::test_posts"
    second = replace(KEPT, test=f"{KEPT.test}_again", figures={"rows": 7}, seconds=2.0)
    tests = [OTHER.test, never, KEPT.test, second.test]
    results = [
        replace(KEPT, outcome="broken", figures={"lost": 3}, commit=BEFORE.commit),
        KEPT,
        replace(KEPT, full=False, outcome="broken"),
        second,
        replace(OTHER, outcome="broken", figures={}, commit=BEFORE.commit, dirty=True),
    ]
    heading, *rows = build_table(results, tests)
    assert heading.split() == ["promise", "commit", "seconds", "figures"]
    assert [" ".join(row.split()) for row in rows] == [
        "1 kept a1b2c3d4 63 kills 200, lost 0; rows 7",
        "2 not run",
        "31 broken 99999999+ 61",
    ]
    [_, one, *_] = build_table([KEPT], tests)
    assert one.split()[:3] == ["1", "in", "part"]


A_PROMISE = """
import os, pytest

@pytest.mark.promises
def test_it(figures):
    figures(kills=3, lost=0)
    assert not os.path.exists("broken")
"""


@pytest.mark.processes
def test_a_run_goes_on_where_the_last_one_of_this_commit_was_stopped(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pytester.path / "results" / "results.jsonl"
    monkeypatch.setattr(ledger, "LEDGER", path)
    monkeypatch.setattr(ledger, "look_at_code", lambda: NOW)
    monkeypatch.setenv("BURNISH_PROMISES", "full")
    pytester.makeini("[pytest]\nmarkers = promises")
    pytester.makepyfile(test_01_first=A_PROMISE, test_02_second=A_PROMISE)

    def run(*options: str) -> pytest.RunResult:
        plugins = ("-p", "tests.promise_fixtures", "-p", "no:cacheprovider")
        return pytester.inline_run(*plugins, "-m", "promises", *options)

    run("--promises-only", "1").assertoutcome(passed=1)
    [first] = ledger.read(path)
    assert (first.promise, first.outcome, first.figures) == (1, "kept", {"kills": 3, "lost": 0})

    (pytester.path / "broken").touch()
    run("--promises-go-on").assertoutcome(failed=1)
    assert [found.promise for found in ledger.read(path)] == [1, 2]
    again = run("--promises-go-on")
    again.assertoutcome()
    assert again.ret == pytest.ExitCode.TESTS_FAILED  # nothing ran, and a promise is broken

    (pytester.path / "broken").unlink()
    run("--promises-only", "2").assertoutcome(passed=1)
    assert run("--promises-go-on").ret == pytest.ExitCode.OK
