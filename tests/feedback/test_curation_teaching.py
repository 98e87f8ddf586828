"""What a person is told that a verdict teaches is what curation makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.curation.examples import (
    AnswerFacts,
    ComparedVerdict,
    DropReason,
    ExampleKind,
    JudgedAnswer,
    Verdict,
)
from feedback.curation.extract import extract
from feedback.curation.policy import Policy
from feedback.curation.teaching import WORDS, describe
from feedback.curation.visible import is_blank, strip_invisible
from tests.feedback.test_curation_extract import build_compared, build_facts, build_verdict

POLICY = Policy(max_completion_chars=60, max_prompt_chars=40)
BY_WHOLE_SET = frozenset(
    {
        DropReason.SUPERSEDED,
        DropReason.PERSON_CAP,
        DropReason.OUTVOTED,
        DropReason.CONTRADICTED,
        DropReason.DUPLICATE,
        DropReason.NEAR_HOLDOUT,
    }
)

texts = st.sampled_from(
    ["", " ", "\u200b\u2060", "Rain.", " Rain.\u200b", "Rain is wet.", "Rain is wet", "x" * 61]
) | st.text(max_size=12)
answers = st.builds(
    lambda text, ending, **facts: build_facts(
        choices=({"index": 0, "message": {"role": "assistant", "content": text}, **ending},),
        **facts,
    ),
    texts | st.none(),
    st.sampled_from(
        [
            {"finish_reason": "stop"},
            {"finish_reason": "stop"},
            {"finish_reason": "length"},
            {"finish_reason": "stop", "stop_reason": "User:"},
        ]
    ),
    kind=st.sampled_from(["chat", "chat", "chat", "task", "text", "internal"]),
    status=st.sampled_from(["complete", "complete", "started", "interrupted", "failed"]),
    stored=st.sampled_from([True, True, False]),
    trainable=st.sampled_from([True, True, False]),
    messages=st.sampled_from(
        [(), ({"role": "user", "content": "Rain?"},), ({"role": "user", "content": "x" * 41},)]
    ),
)
corrections = texts.map(lambda text: {"role": "assistant", "content": text})
values = st.one_of(
    st.tuples(st.just("rating"), st.none() | st.booleans()),
    st.tuples(st.just("stars"), st.none() | st.integers(1, 5)),
    st.tuples(st.just("correction"), st.none() | corrections),
    st.tuples(st.sampled_from(["comment", "signal"]), texts),
)
sources = st.sampled_from(["human", "human", "judge"])
policies = st.builds(
    Policy,
    kinds=st.lists(st.sampled_from(list(ExampleKind)), unique=True).map(tuple),
    min_edit_share=st.sampled_from([0.0, 0.2, 1.0]),
    max_completion_chars=st.sampled_from([60, 1]),
    max_prompt_chars=st.just(40),
    excluded_people=st.sampled_from([(), ("p1",)]),
)


def find_promised(words: str) -> list[str]:
    """The kinds that the words promise; as many labelled ones as they say."""
    if words.startswith("nothing"):
        return []
    kinds = [part.split()[0].rstrip(",;") for part in words.partition("; ")[0].split(" and ")]
    return kinds + ["labelled"] * (", both" in words)


@settings(max_examples=300, deadline=None)
@given(
    answers, st.lists(st.tuples(values, st.sampled_from(["human", "judge"])), max_size=4), policies
)
def test_what_is_promised_of_a_judgement_is_what_is_made_of_it(
    facts: AnswerFacts, said: list[Any], policy: Policy
) -> None:
    """Whatever else was said about the answer."""
    verdicts = tuple(
        build_verdict(kind, value, id=f"fb_{n}", source_type=source)
        for n, ((kind, value), source) in enumerate(said)
    )
    all_made = extract(JudgedAnswer(facts, verdicts), policy).examples
    for verdict in verdicts:
        alone = extract(JudgedAnswer(facts, (verdict,)), policy)
        words = describe([(alone, policy)], verdict.person_id)
        made = [one.feature.kind for one in all_made if one.feature.judgement_id == verdict.id]
        assert find_promised(words) == ([] if policy.excluded_people else made)
        assert not words.endswith((":", "; ")), words


@settings(max_examples=200, deadline=None)
@given(
    answers,
    answers,
    st.sampled_from(["a", "b", "tie", "both_bad", None]),
    st.tuples(policies, policies),
)
def test_what_is_promised_of_a_comparison_is_what_is_made_of_both_answers(
    one: AnswerFacts, other: AnswerFacts, preferred: str | None, both: tuple[Policy, Policy]
) -> None:
    """Of answers of two deployments, each with its policy."""
    sides = [
        JudgedAnswer(mine, (), (build_compared(preferred, side, other=theirs),))
        for side, mine, theirs in (("a", one, other), ("b", other, one))
    ]
    made = [(extract(side, policy), policy) for side, policy in zip(sides, both, strict=True)]
    words = describe(made, "p1")
    kinds = [
        example.feature.kind
        for extracted, policy in made
        if not policy.excluded_people
        for example in extracted.examples
    ]
    assert sorted(find_promised(words)) == sorted(kinds)
    assert "None" not in words


@pytest.mark.parametrize("reason", sorted(set(DropReason) - BY_WHOLE_SET))
def test_every_reason_that_one_verdict_decides_has_words(reason: DropReason) -> None:
    assert WORDS[reason].format(**dict(POLICY))


@pytest.mark.parametrize("reason", sorted(BY_WHOLE_SET))
def test_what_the_whole_set_decides_is_not_promised(reason: DropReason) -> None:
    assert reason not in WORDS


def test_the_words_name_the_bound_and_the_label() -> None:
    def told(verdict: Verdict | ComparedVerdict, policy: Policy = POLICY) -> str:
        assert isinstance(verdict, Verdict)
        made = extract(JudgedAnswer(build_facts(), (verdict,)), policy)
        return describe([(made, policy)], "p1")

    long = build_verdict("correction", {"role": "assistant", "content": "x" * 61})
    assert told(long) == "nothing: the text is longer than 60 characters"
    rated = build_verdict("rating", False)
    assert told(rated) == "labelled false"
    assert describe([], "p1").startswith("nothing: the base model was asked")


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("", True),
        (" \n\t", True),
        ("\u200b\ufeff\u00ad", True),
        ("\u3164\u2800", True),
        ("\u200d", True),
        ("\u200b.", False),
        ("雨", False),
        ("🙂", False),
    ],
)
def test_a_text_is_blank_when_nothing_of_it_can_be_seen(text: str, blank: bool) -> None:
    assert is_blank(text) is blank


def test_joiners_count_where_texts_are_compared() -> None:
    assert strip_invisible("\ufeff Rain\u200b. ") == "Rain."
    assert strip_invisible("می\u200cشود") != strip_invisible("میشود")
