"""What a release has forgotten, measured on plain text and on the base's own answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import httpx
import pytest

from tests.tuner.gateway import FakeGateway
from tuner.evaluation.gateway_client import GatewayClient
from tuner.evaluation.general import (
    PROMPTS,
    BaseAnswer,
    measure_general,
    read_base_answers,
    read_passages,
)
from tuner.evaluation.measurement import Subject, run_evaluation
from tuner.tables import Decision, Release

ANSWERS = [BaseAnswer(prompt, f"Said {number}.", False) for number, prompt in enumerate(PROMPTS)]


def release(number: int, **values: object) -> Release:
    return Release(
        name=f"assistant@{number}",
        deployment="assistant",
        number=number,
        adapter_id=f"ad_{number}" if number else None,
        base_model="tiny",
        base_revision="r1",
        template_hash="t1",
        **values,
    )


def quiet(*_progress: object) -> None:
    """A report that nobody reads."""


def test_the_built_in_text_is_varied_and_short_enough_to_be_read_every_time() -> None:
    passages = read_passages()
    words = sum(len(passage.split()) for passage in passages)
    assert len(set(passages)) == len(passages) >= 12
    assert 1500 < words < 3000
    assert all(passage == passage.strip() and len(passage) < 2000 for passage in passages)


def test_figures_are_per_token_and_the_divergence_is_from_the_base() -> None:
    def logprob(model: str, text: str) -> float:  # of two tokens
        own = text.startswith("Said")
        return {"tiny": -2.0, "assistant@1": -2.5 if own else -3.0}[model]

    gateway = FakeGateway(logprob)
    with gateway.client() as client:
        found = measure_general(client, ["assistant@1", "tiny"], release(0), ANSWERS, quiet)
    tuned, base = found["assistant@1"], found["tiny"]
    assert (tuned.nll, base.nll) == (1.5, 1.0)
    assert tuned.tokens == base.tokens == 2 * len(read_passages())
    assert tuned.moved is not None
    assert base.moved is not None
    assert (tuned.moved.kl, tuned.moved.error) == (0.25, 0.0)
    assert base.moved.kl == 0.0
    asked = [body["model"] for body in gateway.bodies]
    assert set(asked) == {"tiny", "assistant@1"}
    assert asked == sorted(asked, reverse=True)  # each is asked once


def test_the_error_of_the_divergence_is_that_of_answers_as_long_as_they_are() -> None:
    gaps = dict(zip((one.text for one in ANSWERS), [0.0, 1.0] * (len(ANSWERS) // 2), strict=True))
    gateway = FakeGateway(lambda model, text: -1 - gaps.get(text, 0) * (model != "tiny"))
    with gateway.client() as client:
        found = measure_general(client, ["assistant@1"], release(0), ANSWERS, quiet)
    moved = found["assistant@1"].moved
    assert moved is not None
    assert moved.kl == pytest.approx(0.25)
    count = len(ANSWERS)
    deviation = math.sqrt(count * 0.25 / (count - 1))  # of gaps 0 and 1 around their mean
    assert moved.error == pytest.approx(deviation / math.sqrt(count) / 2)


def test_what_has_no_score_gives_no_figure() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        items = json.loads(request.content)["items"]
        return httpx.Response(200, json={"items": [{"error": "too_long"}] * len(items)})

    with GatewayClient("http://gateway", "k", transport=httpx.MockTransport(refuse)) as client:
        found = measure_general(client, ["assistant@1"], release(0), ANSWERS, quiet)
    assert found["assistant@1"].nll is None
    assert found["assistant@1"].moved is None


def test_the_base_is_asked_once_for_all_that_its_answers_depend_on(tmp_path: Path) -> None:
    gateway = FakeGateway(text="Well.")
    with gateway.client() as client:
        first = read_base_answers(client, tmp_path, release(0), quiet)
        again = read_base_answers(client, tmp_path, release(0), quiet)
        assert first == again == [BaseAnswer(prompt, "Well.", False) for prompt in PROMPTS]
        assert gateway.calls["/v1/chat/completions"] == len(PROMPTS)
        sampled = {(body["temperature"], body["top_p"], body["model"]) for body in gateway.bodies}
        assert sampled == {(1, 1, "assistant@0")}
        untouched = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
        assert all(body.items() >= untouched.items() for body in gateway.bodies)
        assert len({body["seed"] for body in gateway.bodies}) == len(PROMPTS)
        read_base_answers(client, tmp_path, release(0, system_prompt="Be kind."), quiet)
        assert gateway.calls["/v1/chat/completions"] == 2 * len(PROMPTS)


@pytest.mark.parametrize("damage", ["", "{", "[]\n", '{"prompt": "Who?", "text": "I."}\n'])
def test_a_damaged_file_of_answers_is_made_anew(tmp_path: Path, damage: str) -> None:
    gateway = FakeGateway()
    with gateway.client() as client:
        found = read_base_answers(client, tmp_path, release(0), quiet)
        (file,) = tmp_path.iterdir()
        whole = file.read_text()
        lines = whole.splitlines(keepends=True)
        for content in (damage, "".join(lines[:-1])):
            file.write_text(content)
            assert read_base_answers(client, tmp_path, release(0), quiet) == found
            assert file.read_text() == whole


def test_a_base_that_cannot_be_asked_leaves_the_figure_out(tmp_path: Path) -> None:
    gateway = FakeGateway()
    gateway.failing["/v1/chat/completions"] = httpx.Response(
        400, json={"error": {"message": "no", "code": None}}
    )
    with gateway.client() as client:
        assert read_base_answers(client, tmp_path, release(0), quiet) is None
    assert [*tmp_path.iterdir()] == []


def test_answers_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "no-folder"
    file.touch()
    with FakeGateway(text="Well.").client() as client:
        found = read_base_answers(client, file, release(0), quiet)
    assert found is not None
    assert len(found) == len(PROMPTS)


def test_an_evaluation_fails_a_candidate_that_forgot_too_much(tmp_path: Path) -> None:
    def logprob(model: str, text: str) -> float:
        return -2.08 if model == "assistant@2" else -2.0

    subject = Subject(release(2), release(0), [], frozenset(), origin=release(0))
    gateway = FakeGateway(logprob, text="Well.")
    with gateway.client() as client:
        result, metrics = run_evaluation(client, subject, report=quiet, folder=tmp_path)
    assert result.decision == Decision.FAIL
    assert len(result.reasons) == 1
    assert "+4.0%" in result.reasons[0]
    assert "lower learning rate" in result.reasons[0]
    assert metrics["general_nll"] == pytest.approx(1.04)
    assert metrics["general_nll_change"] == pytest.approx(0.04)
    assert metrics["kl"] == pytest.approx(0.04)
    assert gateway.held == ["assistant@2"]
    json.dumps(metrics)
