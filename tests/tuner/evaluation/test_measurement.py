"""What is asked of the gateway in an evaluation, and the figures that come of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pytest

from tests.tuner.gateway import FakeGateway
from tests.tuner.records import preference, supervised
from tuner.evaluation.gateway_client import GatewayError
from tuner.evaluation.measurement import Extent, Subject, build_prompt, run_evaluation
from tuner.tables import Decision, Release


def release(number: int, *, adapter: bool = True, prompt: str | None = None) -> Release:
    return Release(
        name=f"assistant@{number}",
        deployment="assistant",
        number=number,
        adapter_id=f"ad_{number}" if adapter else None,
        base_model="tiny",
        system_prompt=prompt,
    )


def labelled(row_id: str, question: str, answer: str, label: bool) -> dict[str, Any]:
    row = supervised(row_id, question, answer)
    return {**row, "kind": "labelled", "label": label}


def subject(rows: Sequence[Mapping[str, Any]], **values: Any) -> Subject:
    return Subject(
        **{
            "candidate": release(1),
            "baseline": release(0, adapter=False),
            "rows": rows,
            "own_prompts": frozenset(),
            **values,
        }
    )


def quiet(_what: str, _done: int, _total: int) -> None:
    """A report that nobody reads."""


ROWS = [supervised(f"ex_{number}", f"Question {number}?", "Good.") for number in range(6)]


def test_a_candidate_that_likes_the_corrections_passes() -> None:
    gateway = FakeGateway()  # two tokens: 0.5 nats per token under the candidate, 1 under the base
    with gateway.client() as client:
        result, metrics = run_evaluation(client, subject(ROWS), report=quiet)
    assert result.decision == Decision.PASS
    assert (result.checks[0].candidate, result.checks[0].baseline) == (0.5, 1.0)
    assert (metrics["supervised_rows"], metrics["generated_answers"]) == (6, 6)
    assert gateway.held == ["assistant@1"]


def test_pairs_are_measured_by_their_margin_over_the_base() -> None:
    nats = {"assistant@1": {"Yes": -1.0, "No": -4.0}, "tiny": {"Yes": -2.0, "No": -2.0}}
    gateway = FakeGateway(lambda model, text: nats[model][text])
    rows = [preference(f"ex_{number}", f"Question {number}?", "Yes", "No") for number in range(6)]
    with gateway.client() as client:
        result, metrics = run_evaluation(client, subject(rows), report=quiet)
    by_name = {check.name: check for check in result.checks}
    # The baseline is the base: every pair a tie.
    assert (by_name["pair_accuracy"].candidate, by_name["pair_accuracy"].baseline) == (1.0, 0.5)
    assert (by_name["chosen_nll"].candidate, by_name["chosen_nll"].baseline) == (0.5, 1.0)
    assert (result.decision, metrics["preference_rows"]) == (Decision.PASS, 6)


def test_labels_are_measured_by_the_move_from_the_baseline() -> None:
    nats = {"assistant@1": {"Liked": -1.0, "Disliked": -4.0}, "tiny": {"Liked": -2, "Disliked": -2}}
    gateway = FakeGateway(lambda model, text: float(nats[model][text]))
    rows = [
        labelled(f"ex_{n}", f"Question {n}?", "Liked" if n % 2 else "Disliked", bool(n % 2))
        for n in range(8)
    ]
    with gateway.client() as client:
        result, _ = run_evaluation(client, subject(rows), report=quiet)
    separation = next(check for check in result.checks if check.name == "label_separation")
    assert (separation.outcome, separation.candidate) == (Decision.PASS, 1.5)


def test_what_is_the_same_request_is_asked_once() -> None:
    gateway = FakeGateway()
    with gateway.client() as client:
        run_evaluation(client, subject(ROWS[:1]), report=quiet, extent=Extent(max_answers=0))
    # The baseline has neither adapter nor prompt: it is the base, whose score is asked once.
    assert [(body["model"], len(body["items"])) for body in gateway.bodies] == [
        ("assistant@1", 1),
        ("tiny", 1),
    ]


def test_effort_bounds_what_is_asked() -> None:
    gateway = FakeGateway()
    extent = Extent(max_rows=2, max_answers=3, max_tokens=5)
    with gateway.client() as client:
        _, metrics = run_evaluation(client, subject(ROWS), report=quiet, extent=extent)
    assert (metrics["supervised_rows"], metrics["holdout_rows"]) == (2, 6)
    assert gateway.calls["/v1/chat/completions"] == 6
    assert {body.get("max_tokens", 5) for body in gateway.bodies} == {5}


def test_without_rows_nothing_is_asked_and_nothing_decided() -> None:
    gateway = FakeGateway()
    with gateway.client() as client:
        result, metrics = run_evaluation(client, subject([], left_out=3), report=quiet)
    assert result.decision == Decision.INCONCLUSIVE
    assert metrics["left_out_rows"] == 3
    assert gateway.calls == {}


def test_a_row_that_cannot_be_scored_is_counted_and_left_out() -> None:
    gateway = FakeGateway()
    gateway.failing["/internal/score"] = httpx.Response(
        200, json={"items": [{"error": "too_long"}]}
    )
    with gateway.client() as client:
        result, metrics = run_evaluation(client, subject(ROWS[:1]), report=quiet)
    assert (metrics["unscored_rows"], metrics["supervised_rows"]) == (1, 0)
    assert result.decision == Decision.INCONCLUSIVE


@pytest.mark.parametrize(("status", "raises"), [(400, False), (404, True)])
def test_a_prompt_that_suits_no_release_is_left_out_and_another_refusal_is_not(
    status: int, raises: bool
) -> None:
    gateway = FakeGateway()
    gateway.failing["/v1/chat/completions"] = httpx.Response(
        status, json={"error": {"message": "no"}}
    )
    with gateway.client() as client:
        if raises:
            with pytest.raises(GatewayError, match="404"):
                run_evaluation(client, subject(ROWS), report=quiet)
        else:
            _, metrics = run_evaluation(client, subject(ROWS), report=quiet)
            assert metrics["generated_answers"] == 0


@pytest.mark.parametrize("path", ["/internal/evaluation-slot", "/internal/score"])
def test_what_the_report_raises_ends_the_evaluation_while_the_gateway_is_silent(path: str) -> None:
    class Ended(Exception):
        pass

    gateway = FakeGateway()
    gateway.silent = path

    def report(_what: str, _done: int, _total: int) -> None:
        if gateway.asked.is_set():
            raise Ended

    with gateway.client() as client:
        with pytest.raises(Ended):
            run_evaluation(client, subject(ROWS), report=report)
        gateway.may_reply.set()


def test_progress_is_told_with_what_there_is_to_do() -> None:
    told: list[tuple[str, int, int]] = []
    gateway = FakeGateway()
    with gateway.client() as client:
        run_evaluation(client, subject(ROWS), report=lambda *facts: told.append(facts))
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        "loading the candidate",
        "scoring the holdout",
        "generating answers",
    ]
    scoring = [facts for facts in told if facts[0] == "scoring the holdout"]
    assert (scoring[0][1:], scoring[-1][1:]) == ((0, 6), (6, 6))


OWN = frozenset({"Be kind.", "Be brief."})
QUESTION = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("first", "prompt", "expected"),
    [
        (None, None, None),
        (None, "Be kind.", "Be kind."),
        ("Be brief.", "Be kind.", "Be kind."),
        ("Be brief.", None, None),
        ("You are a pirate.", "Be kind.", "You are a pirate."),
    ],
)
def test_a_release_is_measured_with_its_own_prompt_unless_the_caller_had_one(
    first: str | None, prompt: str | None, expected: str | None
) -> None:
    kept = [] if first is None else [{"role": "system", "content": first, "burnish": True}]
    built = build_prompt([*kept, QUESTION], release(1, prompt=prompt), subject([], own_prompts=OWN))
    found = built[0]["content"] if built[0]["role"] == "system" else None
    assert (found, built[-1]) == (expected, QUESTION)


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("Be brief.", "New."),
        ("Be brief.\n\nI am Anna.", "New.\n\nI am Anna."),
        (in_parts("Be brief.\n", "I am Anna."), "New.\n\nI am Anna."),
        ("I am Anna.", "New.\n\nI am Anna."),
        (None, "New."),
    ],
)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_prepended_prompt_is_replaced_before_what_the_caller_said(
    first: Any, expected: str, role: str
) -> None:
    kept = [] if first is None else [{"role": role, "content": first}]
    of = subject([], own_prompts=OWN, prepends=True)
    built = build_prompt([*kept, QUESTION], release(1, prompt="New."), of)
    assert (built[0]["content"], built[1:]) == (expected, [QUESTION])


def test_tools_and_variables_of_a_row_are_shown_to_both_releases() -> None:
    tools = [{"type": "function", "function": {"parameters": {"z": 1, "a": 2}, "name": "f"}}]
    system = {"role": "system", "content": in_parts("Be", "kind.")}
    row = supervised("ex_1", "Question?", "Good.")
    variables = {"reasoning_effort": "low", "enable_thinking": True, "thinking": False}
    row |= {"tools": tools, "template_kwargs": variables}
    row["prompt"] = [system, *row["prompt"]]
    gateway = FakeGateway()
    with gateway.client() as client:
        run_evaluation(client, subject([row]), report=quiet)
    scored = [item for body in gateway.bodies for item in body.get("items", [])]
    assert [item["template_kwargs"] for item in scored] == [variables] * 2
    written = [body for body in gateway.bodies if "items" not in body]
    assert [body["tool_choice"] for body in written] == ["none", "none"]
    for asked in written:
        assert asked["reasoning_effort"] == "low"
        assert asked["chat_template_kwargs"] == {"thinking": False}
    assert written[0]["messages"][0] == {"role": "system", "content": "Be\nkind."}
    for asked in [*scored, *written]:
        assert json.dumps(asked["tools"]) == json.dumps(tools)  # keys in the caller's order
