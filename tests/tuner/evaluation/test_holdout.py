"""Rows of a holdout, read when they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.evaluation.test_measurement import quiet, subject
from tests.tuner.gateway import FakeGateway
from tests.tuner.records import preference, supervised
from tuner.evaluation import measurement
from tuner.evaluation.holdout import Holdout, HoldoutFiles


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    return path


def test_rows_are_read_whole_in_an_order_that_does_not_depend_on_the_files(tmp_path: Path) -> None:
    rows = [supervised(f"ex_{n}", f"Frage {n}: für wen?", "雨。") for n in range(9)]
    one = Holdout(HoldoutFiles([write(tmp_path / "one", rows)], []))
    parts = [write(tmp_path / "a", rows[5:]), write(tmp_path / "b", rows[:5])]
    other = Holdout(HoldoutFiles(parts, []))
    assert list(one) == list(other) == one[:]
    assert sorted(row["id"] for row in one) == [row["id"] for row in rows]
    assert all(row in rows for row in one)


SAID_AGAIN = ("cafe\u0301", "full")


def test_a_prompt_that_was_learned_from_is_known_in_every_form(tmp_path: Path) -> None:
    held = [supervised(f"ex_{n}", text, "Good.") for n, text in enumerate(("Café?", " Ｆｕｌｌ?"))]
    learned = [
        supervised(f"ex_l{n}", text, "Yes.") for n, text in enumerate(("cafe\u0301?", "full?"))
    ]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Call."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    held.append({**held[0], "id": "ex_other", "prompt": turns})
    learned.append(
        {**held[0], "id": "ex_l", "prompt": [*turns[:1], {**turns[1], "tool_calls": None}]}
    )
    files = HoldoutFiles([write(tmp_path / "held", held)], [write(tmp_path / "l", learned)])
    assert [row["id"] for row in Holdout(files)] == ["ex_other"]


def test_a_row_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "held", [supervised(f"ex_{n}", f"{n}?", "Good.") for n in range(3)])
    holdout = Holdout(HoldoutFiles([path], []))
    path.unlink()
    assert len(holdout) == 3
    with pytest.raises(FileNotFoundError):
        holdout[0]


def test_looking_through_files_can_be_ended(tmp_path: Path) -> None:
    class Ended(Exception):
        pass

    def end() -> None:
        raise Ended

    path = write(tmp_path / "held", [supervised("ex_1", "One?", "Good.")])
    with pytest.raises(Ended):
        Holdout(HoldoutFiles([], [path]), check=end)


def test_no_more_rows_are_read_than_are_measured(
    tmp_path: Path,
) -> None:
    read: list[int] = []

    class Watched(Holdout):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    rows = [supervised(f"ex_{n}", f"Question {n}?", "Yes") for n in range(20)]
    rows.append(preference("ex_p", "Which?", "Yes", "No"))
    holdout = Watched(HoldoutFiles([write(tmp_path / "held", rows)], []))
    extent = measurement.Extent(max_rows=3, max_answers=2)
    with FakeGateway().client() as client:
        _, metrics = measurement.run_evaluation(
            client, subject(holdout), report=quiet, extent=extent
        )
    assert (metrics["supervised_rows"], metrics["preference_rows"]) == (3, 1)
    assert metrics["generated_answers"] == 2
    assert len(read) == 6


def test_rows_are_scored_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [preference(f"ex_{n}", f"Question {n}?", "Yes", "No") for n in range(25)]
    holdout = Holdout(HoldoutFiles([write(tmp_path / "held", rows)], []))
    monkeypatch.setattr(measurement, "ROWS_PER_PORTION", 4)
    gateway = FakeGateway()
    extent = measurement.Extent(max_rows=10, max_answers=0)
    with gateway.client() as client:
        _, metrics = measurement.run_evaluation(
            client, subject(holdout), report=quiet, extent=extent
        )
    asked = [len(body["items"]) for body in gateway.bodies if body["model"] == "tiny"]
    assert asked == [8, 8, 4]  # both answers of four, four and two rows
    assert (metrics["preference_rows"], metrics["holdout_rows"]) == (10, 25)
