"""The first stage of curation: what each verdict on one answer makes, and why not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.answers import OURS
from feedback.curation.examples import (
    AnswerFacts,
    ComparedVerdict,
    Example,
    ExampleKind,
    JudgedAnswer,
    Verdict,
)
from feedback.curation.extract import build_near_hash, edit_share, extract
from feedback.curation.files import to_openai
from feedback.curation.policy import Policy
from feedback.errors import BadRequest
from feedback.tables import Preferred

AT = datetime(2026, 3, 1, tzinfo=UTC)
POLICY = Policy()
BETTER = {"role": "assistant", "content": "Drops of water, fallen from a cloud onto the ground"}


def build_facts(reply: str | None = "Water from the sky.", **fields: Any) -> AnswerFacts:
    message = {"role": "assistant", "content": reply}
    defaults: dict[str, Any] = {
        "id": "a1",
        "deployment": "assistant",
        "kind": "chat",
        "status": "complete",
        "stored": True,
        "trainable": True,
        "root_hash": "root",
        "messages": (
            {"role": "system", "content": "Be brief.", OURS: True},
            {"role": "user", "content": "What is rain?"},
        ),
        "choices": ({"index": 0, "message": message, "finish_reason": "stop"},),
        "template_hash": "template",
        "prompt_tokens": 12,
    }
    return AnswerFacts(**{**defaults, **fields})


def build_verdict(kind: str, value: Any, **fields: Any) -> Verdict:
    return Verdict(
        **{"id": "fb_1", "person_id": "p1", "judged_at": AT, **fields}, kind=kind, value=value
    )


def build_compared(preferred: str | None, side: str = "a", **fields: Any) -> ComparedVerdict:
    defaults: dict[str, Any] = {
        "id": "comp_1",
        "person_id": "p1",
        "choice_index": 0,
        "other": build_facts("Rain is wet.", id="a2"),
        "other_choice_index": 0,
        "judged_at": AT,
    }
    return ComparedVerdict(**{**defaults, **fields}, side=Preferred(side), preferred=preferred)


def make(facts: AnswerFacts, *said: Verdict | ComparedVerdict, policy: Policy = POLICY) -> Any:
    """(rows made, (reason, kind) of drops)."""
    verdicts = tuple(one for one in said if isinstance(one, Verdict))
    compared = tuple(one for one in said if isinstance(one, ComparedVerdict))
    extracted = extract(JudgedAnswer(facts, verdicts, compared), policy)
    rows = [example.row for example in extracted.examples]
    return rows, [(str(drop.reason), drop.kind) for drop in extracted.drops]


@pytest.mark.parametrize(
    ("kind", "value", "label"),
    [
        ("rating", True, True),
        ("rating", False, False),
        ("stars", 5, True),
        ("stars", 4, True),
        ("stars", 3, None),
        ("stars", 2, False),
        ("stars", 1, False),
        ("comment", "Nice", None),
        ("signal", 1, None),
    ],
)
def test_what_a_verdict_teaches_by_default(kind: str, value: Any, label: bool | None) -> None:
    rows, drops = make(build_facts(), build_verdict(kind, value))
    if label is None:
        assert (rows, drops) == ([], [("teaches_nothing", None)])
    else:
        assert [row["label"] for row in rows] == [label]
        assert drops == []


def test_a_row_has_exactly_what_training_reads() -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    rows, _ = make(build_facts(tools=tools), build_verdict("rating", True))
    assert rows == [
        {
            "kind": "labelled",
            "id": rows[0]["id"],
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is rain?"},
            ],
            "completion": [{"role": "assistant", "content": "Water from the sky."}],
            "label": True,
            "tools": list(tools),
            "prompt_tokens": 12,
            "template_hash": "template",
            "weight": 1.0,
        }
    ]


def test_a_large_edit_teaches_the_completion_and_the_preference() -> None:
    rows, drops = make(build_facts(), build_verdict("correction", BETTER))
    assert [row["kind"] for row in rows] == ["supervised", "preference"]
    assert rows[0]["completion"] == rows[1]["chosen"] == [BETTER]
    assert rows[1]["rejected"] == [{"role": "assistant", "content": "Water from the sky."}]
    assert rows[0]["corrects"] == rows[1]["rejected"]
    assert "corrects" not in rows[1]
    assert drops == []


def test_what_a_correction_was_of_is_no_part_of_what_it_teaches() -> None:
    verdict = build_verdict("correction", BETTER)
    (one, *_), _ = make(build_facts(), verdict)
    (other, *_), _ = make(build_facts(reply="It is wet outside."), verdict)
    assert one["id"] == other["id"]
    assert one["corrects"] != other["corrects"]
    (alone,), _ = make(build_facts(status="failed", choices=()), verdict)
    assert "corrects" not in alone
    tight = Policy(max_completion_chars=len(BETTER["content"]))
    (short, *_), _ = make(build_facts(reply="Rain. " * 50), verdict, policy=tight)
    assert "corrects" not in short


@pytest.mark.parametrize(
    ("facts", "correction", "kinds", "reasons"),
    [
        ({}, "Water from the skies.", ["supervised"], ["small_edit"]),
        ({}, " Water from the sky. ", [], ["unchanged_correction"] * 2),
        ({"status": "interrupted"}, "Drops of water", ["supervised"], ["interrupted"]),
        ({"status": "failed", "choices": ()}, "Drops", ["supervised"], ["failed"]),
        ({"trainable": False}, "Drops", [], ["not_trainable"]),
        ({"messages": (), "stored": False}, "Drops", [], ["not_stored"]),
    ],
)
def test_what_a_correction_cannot_teach_is_named(
    facts: dict[str, Any], correction: str, kinds: list[str], reasons: list[str]
) -> None:
    policy = Policy(min_edit_share=0.5)
    value = {"role": "assistant", "content": correction}
    rows, drops = make(build_facts(**facts), build_verdict("correction", value), policy=policy)
    assert [row["kind"] for row in rows] == kinds
    assert [reason for reason, _ in drops] == reasons


@pytest.mark.parametrize(
    ("facts", "verdict", "policy", "reason"),
    [
        ({}, {"value": None}, {}, "withdrawn"),
        ({}, {"source_type": "judge"}, {}, "not_human"),
        ({"kind": "text"}, {}, {}, "text_completion"),
        ({"kind": "task"}, {}, {}, "task"),
        ({"kind": "internal"}, {}, {}, "internal"),
        ({"status": "started"}, {}, {}, "unfinished"),
        ({"status": "interrupted"}, {}, {}, "interrupted"),
        ({"status": "failed"}, {}, {}, "failed"),
        ({"reply": " "}, {}, {}, "empty_answer"),
        ({"reply": None}, {}, {}, "empty_answer"),
        ({}, {"choice_index": 3}, {}, "empty_answer"),
        ({}, {}, {"max_prompt_chars": 5}, "prompt_too_long"),
        ({}, {}, {"max_completion_chars": 5}, "completion_too_long"),
        ({}, {}, {"kinds": (ExampleKind.SUPERVISED,)}, "kind_excluded"),
    ],
)
def test_each_reason_for_which_a_good_answer_is_not_learned(
    facts: dict[str, Any], verdict: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    said = build_verdict(**{"kind": "rating", "value": True, **verdict})
    rows, drops = make(build_facts(**facts), said, policy=Policy(**policy))
    assert rows == []
    assert [found for found, _ in drops] == [reason]


def build_ended(reply: str = "Water from", **ended: str | None) -> AnswerFacts:
    """An answer that ended so."""
    message = {"role": "assistant", "content": reply}
    return build_facts(id="a2", choices=({"index": 0, "message": message, **ended},))


CUT_OFF: list[dict[str, str]] = [
    {"finish_reason": "length"},
    {"finish_reason": "repetition"},
    {"finish_reason": "content_filter"},
    {"finish_reason": "stop", "stop_reason": "User:"},
]


@pytest.mark.parametrize("ended", CUT_OFF, ids=str)
def test_an_answer_that_was_cut_off_is_no_model(ended: dict[str, str]) -> None:
    cut = build_ended(**ended)
    assert make(cut, build_verdict("rating", True)) == ([], [("truncated", "labelled")])
    preferred = build_compared("b", other=cut)
    assert make(build_facts(), preferred) == ([], [("truncated", "preference")])


@pytest.mark.parametrize("ended", CUT_OFF, ids=str)
def test_an_answer_that_was_cut_off_is_a_bad_example_without_an_end(ended: dict[str, str]) -> None:
    cut = build_ended(**ended)
    marked = {"role": "assistant", "content": "Water from", "cut_off": True}
    for said in (build_verdict("rating", False), build_compared("both_bad", other=build_facts())):
        rows, _ = make(cut, said)
        assert [(row["completion"], row["label"]) for row in rows] == [([marked], False)]
    rows, _ = make(cut, build_verdict("correction", BETTER))
    assert [row["kind"] for row in rows] == ["supervised", "preference"]
    assert rows[1]["rejected"] == [marked]
    assert [to_openai(row) is None for row in rows] == [False, True]
    compared, _ = make(build_facts(), build_compared("a", other=cut))
    assert (compared[0]["rejected"], "cut_off" in compared[0]["chosen"][0]) == ([marked], False)


@pytest.mark.parametrize("finish", ["stop", "tool_calls", "function_call", None])
def test_an_answer_that_ended_by_itself_teaches(finish: str | None) -> None:
    for value in (True, False):
        rows, drops = make(build_ended(finish_reason=finish), build_verdict("rating", value))
        assert ([row["label"] for row in rows], drops) == ([value], [])
        assert "cut_off" not in rows[0]["completion"][0]


@pytest.mark.parametrize(
    ("preferred", "chosen"), [("a", "Water from the sky."), ("b", "Rain is wet.")]
)
def test_a_comparison_is_told_once_by_side_a(preferred: str, chosen: str) -> None:
    rows, drops = make(build_facts(), build_compared(preferred))
    assert [row["chosen"][0]["content"] for row in rows] == [chosen]
    assert drops == []
    other = build_compared(preferred, side="b", other=build_facts())
    assert make(build_facts("Rain is wet.", id="a2"), other) == ([], [])


def test_each_side_tells_where_the_deployments_differ() -> None:
    poem = build_facts("Rain is wet.", id="a2", deployment="poet")
    one, _ = make(build_facts(), build_compared("b", other=poem))
    other, _ = make(poem, build_compared("b", side="b", other=build_facts()))
    assert one == other
    assert one[0]["chosen"][0]["content"] == "Rain is wet."


def test_both_bad_labels_each_side_false() -> None:
    for side in ("a", "b"):
        rows, drops = make(build_facts(), build_compared("both_bad", side=side))
        assert [(row["kind"], row["label"]) for row in rows] == [("labelled", False)]
        assert drops == []


@pytest.mark.parametrize(
    ("compared", "reason"),
    [
        ({"preferred": "tie"}, "teaches_nothing"),
        ({"preferred": None}, "withdrawn"),
        ({"preferred": "a", "source_type": "code"}, "not_human"),
        ({"preferred": "a", "other": build_facts(id="a2")}, "equal_answers"),
        ({"preferred": "a", "other": build_facts("x", id="a2", trainable=False)}, "not_trainable"),
    ],
)
def test_comparisons_that_teach_nothing(compared: dict[str, Any], reason: str) -> None:
    rows, drops = make(build_facts(), build_compared(**compared))
    assert rows == []
    assert [found for found, _ in drops] == [reason]


def test_the_id_names_what_is_taught_and_not_who_or_when() -> None:
    def example_id(facts: AnswerFacts, verdict: Verdict) -> str:
        return extract(JudgedAnswer(facts, (verdict,)), POLICY).examples[0].feature.example_id

    one = example_id(build_facts(), build_verdict("rating", True))
    again = build_verdict("stars", 5, person_id="p2", id="fb_9", judged_at=datetime.now(UTC))
    assert example_id(build_facts(id="a9"), again) == one
    assert example_id(build_facts(), build_verdict("rating", False)) != one
    assert example_id(build_facts("Else"), build_verdict("rating", True)) != one


@pytest.mark.parametrize(
    ("prompt", "near"),
    [
        ("what is  rain", True),
        ("What - is RAIN?!", True),
        ("What is snow?", False),
        ("Is what rain?", False),
    ],
)
def test_prompts_are_near_when_only_case_space_and_signs_differ(prompt: str, near: bool) -> None:
    one, other = (
        build_near_hash([{"role": "system", "content": text}, {"role": "user", "content": text}])
        for text in ("What is rain?", prompt)
    )
    assert (one == other) is near


def test_prompts_without_words_are_near_only_when_equal() -> None:
    one, other = (build_near_hash([{"role": "user", "content": text}]) for text in ("?!", "!?"))
    assert one != other


def test_an_example_survives_the_cache() -> None:
    answer = JudgedAnswer(build_facts(), (build_verdict("correction", BETTER),))
    for example in extract(answer, POLICY).examples:
        assert Example.from_json(example.to_json()) == example


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_an_edits_share_is_symmetric_and_ignores_white_space(one: str, other: str) -> None:
    share = edit_share(one, other)
    assert share == edit_share(other, one)
    assert 0 <= share <= 1
    assert edit_share(one, f"  {one}\n") == 0


def test_an_edits_share_grows_with_the_edit() -> None:
    sentence = "rain is water that falls from the clouds onto the ground in small drops today"
    small = edit_share(sentence, sentence.replace("small", "large"))
    large = edit_share(sentence, "rain is what wets you")
    assert 0 < small < POLICY.min_edit_share < large
    assert edit_share("雨は水です", "雪は氷です") < 1, "writing without spaces counts by character"


def test_a_policy_says_everything_that_is_wrong_with_it() -> None:
    with pytest.raises(BadRequest) as refused:
        Policy.from_json({"person_cap": 0, "colour": "red"})
    assert "'colour' is not known" in refused.value.message
    assert "'person_cap'" in refused.value.message
    with pytest.raises(BadRequest, match="must be below"):
        Policy.from_json({"stars_true": 3, "stars_false": 3})


def test_a_policys_hashes_move_with_what_they_name() -> None:
    assert Policy.from_json(POLICY.to_json()).hash == POLICY.hash
    capped, strict = Policy(person_cap=1), Policy(stars_true=5)
    assert capped.hash != POLICY.hash
    assert capped.extraction_hash == POLICY.extraction_hash != strict.extraction_hash
