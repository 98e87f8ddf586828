"""What may be said in a verdict, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from feedback.errors import BadRequest
from feedback.tables import JudgementKind
from feedback.verdicts import (
    MAX_COMMENT_CHARS,
    check_comment,
    check_id,
    check_kind,
    check_metadata,
    check_reasons,
    check_source,
    check_value,
)

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASSISTANT = {"role": "assistant"}


@pytest.mark.parametrize(
    ("kind", "value", "stored"),
    [
        ("rating", True, True),
        ("rating", False, False),
        ("stars", 5, 5),
        ("stars", 4.0, 4),
        ("correction", "Better", {**ASSISTANT, "content": "Better"}),
        ("correction", {**ASSISTANT, "content": "B"}, {**ASSISTANT, "content": "B"}),
        (
            "correction",
            {**ASSISTANT, "content": None, "tool_calls": [{**CALL, "index": 0}]},
            {**ASSISTANT, "content": None, "tool_calls": [CALL]},
        ),
        ("comment", "Nice", "Nice"),
        ("signal", "x", "x"),
        ("signal", 0.5, 0.5),
        ("signal", -(2**63) + 1, -(2**63) + 1),
        ("signal", True, True),
        *((kind, None, None) for kind in JudgementKind),
    ],
)
def test_values_that_are_taken(kind: str, value: Any, stored: Any) -> None:
    found = check_value(JudgementKind(kind), value)
    assert found == stored
    assert type(found) is type(stored)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("rating", 1, "'stars'"),
        ("rating", 0, "'stars'"),
        ("rating", -1, "'stars'"),
        ("rating", "true", "'true'"),
        ("stars", True, "'rating'"),
        ("stars", 0, "found 0"),
        ("stars", 6, "from 1 to 5"),
        ("stars", 4.5, "whole number"),
        pytest.param("stars", 10**5000, "a number too large", id="stars-long"),
        ("correction", "  ", "not empty"),
        ("correction", {"role": "user", "content": "B"}, "an object"),
        ("correction", {**ASSISTANT, "content": "B", "name": "x"}, "'name' too"),
        ("correction", {**ASSISTANT, "content": None, "tool_calls": [{}]}, "tool_calls"),
        ("correction", {**ASSISTANT, "tool_calls": "f"}, "a list"),
        ("correction", "x" * 100_001, "100001 characters"),
        ("comment", "", "not empty"),
        ("comment", "a\x00b", r"U\+0000 at 1"),
        ("comment", "\ud800", r"U\+D800"),
        ("signal", [1], "a list"),
        ("signal", float("inf"), "inf"),
        ("signal", 2**63, "a number too large"),
    ],
)
def test_values_that_are_refused_with_what_is_expected(kind: str, value: Any, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as refused:
        check_value(JudgementKind(kind), value)
    assert refused.value.status == 400
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("thumb", "", "'rating', 'stars'"),
        ("signal", "", "needs a name"),
        ("rating", "helpfulness", "kind 'signal'"),
        ("signal", "x" * 65, "65 characters"),
    ],
)
def test_kinds_and_names_that_do_not_go_together(kind: str, name: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        check_kind(kind, name)


def test_what_stands_beside_a_verdict_has_bounds() -> None:
    assert check_comment(None) is None
    assert check_comment("x" * MAX_COMMENT_CHARS) == "x" * MAX_COMMENT_CHARS
    assert check_reasons(["wrong", "rude"]) == ["wrong", "rude"]
    assert check_metadata({"k": "v"}) == {"k": "v"}
    assert check_id("abc", "id") == "abc"
    check_source("judge", "gpt")
    over: list[Any] = [
        lambda: check_comment("x" * (MAX_COMMENT_CHARS + 1)),
        lambda: check_reasons(["x"] * 17),
        lambda: check_reasons(["x" * 201]),
        lambda: check_metadata({str(n): "v" for n in range(17)}),
        lambda: check_metadata({"k" * 65: "v"}),
        lambda: check_metadata({"k": "v" * 513}),
        lambda: check_id("", "id"),
        lambda: check_id("x" * 129, "id"),
        lambda: check_source("robot", ""),
        lambda: check_source("human", "x" * 129),
    ]
    for call in over:
        with pytest.raises(BadRequest):
            call()
