"""The learning benchmark without a model: its wishes, its crowd, its file and its statistics."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.crowd import report, running
from benchmarks.crowd.people import PEOPLE, SINGLE, SIZES, Kinds, Turn, judge, plan, spoil
from benchmarks.crowd.prompts import HELD_OUT, JUDGED
from benchmarks.crowd.results import (
    BASE,
    Cell,
    cell_of,
    list_needed,
    list_open,
    mcnemar,
    read_results,
    wilson,
    write_result,
)
from benchmarks.crowd.wishes import BY_NAME, REPORTED, TUNING, WISHES, Wish
from tuner.methods import Method

TEXTS = st.text(max_size=120) | st.text(alphabet="aB1 \n.-*,#'’?!:)nteSs", max_size=120)
SHORT, GLAD = BY_NAME["two_sentences"], BY_NAME["glad"]
LONG = "One is here. Two is there. Three is gone. Four."


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_better_answer_meets_the_wish_and_stays_as_it_is(text: str) -> None:
    for wish in WISHES:
        better = wish.better("A prompt.", text)
        assert wish.is_met("A prompt.", better), wish.name
        assert wish.better("A prompt.", better) == better, wish.name


@pytest.mark.parametrize(
    ("name", "answer", "better"),
    [
        ("two_sentences", LONG, "One is here. Two is there."),
        ("short", "1. Wash it.\n2. Dry it.\n3. Iron", "1. Wash it.\n2. Dry it.\n3. Iron"),
        ("bullets", "1. Wash it.\n2. Dry it.\n3. Iro", "- Wash it.\n- Dry it."),
        ("one_paragraph", "Do so:\n\n- wash it.\n- dry it.", "Do so: wash it. dry it."),
        ("no_digits", "1. Take 2 eggs.\n2. Wait.", "- Take two eggs.\n- Wait."),
        ("no_contractions", "It’s late. I can't go.", "it is late. I cannot go."),
        ("glad", "A river flows. It ends in the", "A river flows. Glad to help!"),
        ("asks_back", "A river flows.", "A river flows. Would you like to know more?"),
    ],
)
def test_better_answers_are_what_a_person_would_write(name: str, answer: str, better: str) -> None:
    assert BY_NAME[name].better("A prompt.", answer) == better


def test_reported_wishes_and_those_that_tune_the_recipe_are_others() -> None:
    assert len(WISHES) >= 12
    assert (len(REPORTED), len(TUNING), len({*REPORTED, *TUNING})) == (5, 2, 7)
    assert {*REPORTED, *TUNING} <= BY_NAME.keys()


def test_held_out_prompts_are_about_other_subjects() -> None:
    judged, held_out = [p.text for p in JUDGED], [p.text for p in HELD_OUT]
    assert len(judged) == len({*judged}) >= 420
    assert len(held_out) == len({*held_out}) >= 160
    assert {p.task for p in JUDGED} == {p.task for p in HELD_OUT}
    said = "\n".join(judged).casefold()
    for prompt in HELD_OUT:
        for part in prompt.subject.casefold().split(" and "):
            bare = re.sub(r"^(?:a|an|the|my|his|their) ", "", part)
            assert re.search(rf"\b{re.escape(bare)}\b", said) is None, prompt


@pytest.mark.parametrize("kinds", Kinds)
def test_noise_mix_and_people_are_exact_in_every_size(kinds: Kinds) -> None:
    turns = plan(SHORT, kinds, PEOPLE, seed=1)
    assert len({turn.prompt.text for turn in turns}) == len(turns) == SIZES[-1]
    for size in SIZES:
        first = turns[:size]
        assert plan(SHORT, kinds, PEOPLE, seed=1, size=size) == first
        assert sum(turn.turned for turn in first) * 10 == size
        given = Counter(turn.kind for turn in first)
        expected = SINGLE if kinds is Kinds.MIXED else (kinds,)
        assert set(given) == set(expected)
        assert max(given.values()) - min(given.values()) <= 1
    assert set(Counter(turn.person for turn in turns).values()) == {SIZES[-1] // PEOPLE}
    assert plan(SHORT, kinds, PEOPLE, seed=2) != turns
    assert {turn.person for turn in plan(SHORT, kinds, 1, seed=1)} == {"person-01"}


def _turn(kind: Kinds, *, turned: bool = False) -> Turn:
    return Turn(0, "person-07", kind, JUDGED[0], turned)


@pytest.mark.parametrize(
    ("answers", "said", "turned"),
    [
        (("Good.", LONG), "a", "b"),
        ((LONG, "Good."), "b", "a"),
        (("Good.", "Fine."), "tie", "both_bad"),
        ((LONG, LONG), "both_bad", "tie"),
    ],
)
def test_comparisons_say_what_the_wish_says(
    answers: tuple[str, str], said: str, turned: str
) -> None:
    for noise, preferred in ((False, said), (True, turned)):
        verdict = judge(SHORT, _turn(Kinds.COMPARISONS, turned=noise), ["x", "y"], answers)
        assert verdict == {
            "user": "person-07",
            "completion_ids": ["x", "y"],
            "preferred": preferred,
        }


def test_thumbs_and_corrections_say_what_the_wish_says() -> None:
    about = {"user": "person-07", "completion_id": "x"}
    for turned in (False, True):
        thumb = judge(SHORT, _turn(Kinds.THUMBS, turned=turned), ["x"], [LONG])
        assert thumb == {**about, "kind": "rating", "value": turned}
        correction = judge(SHORT, _turn(Kinds.CORRECTIONS, turned=turned), ["x"], [LONG])
        assert correction["kind"] == "correction"
        assert correction["value"] != LONG
        assert SHORT.is_met("", correction["value"]) != turned


def test_people_ask_again_to_find_something_to_correct() -> None:
    corrects, compares = _turn(Kinds.CORRECTIONS), _turn(Kinds.COMPARISONS)
    asked: list[tuple[Turn, list[str], bool]] = [
        (corrects, [], True),
        (corrects, [LONG], False),
        (corrects, ["Good."], True),
        (corrects, ["Good."] * 3, False),
        (compares, [LONG], True),
        (compares, [LONG, LONG], False),
        (_turn(Kinds.THUMBS), ["Good."], False),
    ]
    for turn, answers, again in asked:
        assert turn.wants_another(SHORT, answers) is again
    verdict = judge(SHORT, corrects, ["x", "y"], ["Good.", LONG])
    assert verdict["completion_id"] == "y"


@pytest.mark.parametrize("wish", [SHORT, GLAD, BY_NAME["bullets"], BY_NAME["one_paragraph"]])
def test_a_spoilt_correction_misses_the_wish(wish: Wish) -> None:
    answer = f"{LONG}\n\n1. Five."
    spoilt = spoil(wish, "", answer)
    assert spoilt not in ("", answer)
    assert not wish.is_met("", spoilt)


def test_the_needed_cells_are_those_that_the_project_shows() -> None:
    cells = list_needed([*Method])
    assert len({cell.key for cell in cells}) == len(cells)
    combined = [cell for cell in cells if cell.method == Method.COMBINED]
    counted = Counter((cell.kinds, cell.people, cell.size, cell.seed) for cell in combined)
    mixed = [(Kinds.MIXED, PEOPLE, size, 1) for size in SIZES]
    mixed += [(Kinds.MIXED, PEOPLE, 200, seed) for seed in (2, 3)]
    alone = [(kinds, PEOPLE, 200, 1) for kinds in (Kinds.THUMBS, Kinds.COMPARISONS)]
    assert counted == dict.fromkeys([*mixed, *alone, (Kinds.CORRECTIONS, 1, 20, 1)], 5)
    others = {cell.method for cell in cells if cell.size == 200} - {Method.COMBINED}
    assert others == {*Method} - {Method.COMBINED}
    assert all(cell.method in tuple(Method) for cell in list_needed())


def _row(cell: Cell, outcomes: str = "0110", cost: float | None = 0.01) -> dict[str, object]:
    facts = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
    figures = {"met": outcomes.count("1"), "asked": len(outcomes), "outcomes": outcomes}
    more = {"general_nll_change": cost, "kl": 0.02, "decision": "pass", "training_seconds": 61}
    return {**facts, **figures, **more}


def test_cells_that_have_a_result_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "results" / "learning.jsonl"
    first = Cell("glad", size=20, method="supervised", settings={"r": 4, "learning_rate": 1e-3})
    second = Cell("glad", size=50, method="supervised")
    cells = [first, second, first]
    assert list_open(cells, read_results(path), again=False) == [first, second]
    write_result(path, _row(first))
    rows = read_results(path)
    assert [cell_of(row) for row in rows.values()] == [first]
    assert list_open(cells, rows, again=False) == [second]
    assert list_open(cells, rows, again=True) == [first, second]
    write_result(path, _row(second))
    write_result(path, _row(first, "1111"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["size"], line["met"]) for line in lines] == [(20, 4), (50, 2)]
    with path.open("a") as file:
        file.write('{"wish": "gl')
    with pytest.raises(ValueError, match="line 3"):
        read_results(path)


def test_wilson_and_mcnemar_are_as_in_the_books() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert mcnemar("0000000011", "1111111111") == pytest.approx(2 / 2**8)
    assert mcnemar("0011", "0011") == 1.0
    assert mcnemar("01" * 5, "10" * 5) == 1.0
    with pytest.raises(ValueError, match="zip"):
        mcnemar("01", "011")


def test_table_and_plots_show_the_rows() -> None:
    base = Cell("glad", size=0, seed=0, method=BASE)
    cells = [Cell("glad", size=size, method="supervised") for size in (50, 200)]
    shown = [_row(base, "0000", None), _row(cells[0]), _row(cells[1], "1111", None)]
    rows = {cell_of(row).key: row for row in shown}
    text = report.table(rows)
    assert "| 50 mixed | 40 | 1 | supervised | 0% | 50% | 15% to 85% |" in text
    assert text.count("\n") == 4
    assert report.by_size(rows.values()) == {"supervised": [(50.0, 0.5), (200.0, 1.0)]}
    assert report.frontier(shown, size=50) == {"supervised": [(0.01, 0.5)]}
    for svg in (report.plot_sizes(rows), report.plot_frontier(rows)):
        assert svg.startswith("<svg")
        assert svg.count("<svg") == svg.count("</svg>") == 1


def test_general_text_is_what_files_say_without_questions(tmp_path: Path) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("Plain.")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    shapes = [
        {"messages": turns},
        {"input": {}, "preferred_output": turns[1:]},
        {"prompt": "Why?", "completion": "Thus."},
        {"prompt": "Why?"},
    ]
    rows.write_text("\n".join(map(json.dumps, shapes)))
    assert running.read_general([plain, rows]) == "Plain.\n\nSo.\n\nSo.\n\nThus."
