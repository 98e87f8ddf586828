"""What the gateway itself asks of an engine that answers with something else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.engines.base import EngineAddress, EngineRefused
from server.engines.vllm import VllmEngine, error_message
from tests.fake_engine import FakeEngine, Faults


def figures(logprob: Any) -> str:
    shown = [None, {"2": {"logprob": logprob}}]
    choice = {"index": 0, "text": "", "prompt_logprobs": shown}
    return json.dumps({"model": "tiny", "choices": [choice]})


@pytest.mark.anyio
@pytest.mark.parametrize(
    "says",
    [
        "<html>",
        "[" * 100_000,
        "null",
        "7",
        '{"model": "tiny", "choices": "none"}',
        '{"model": "tiny", "choices": [7]}',
        figures("high"),
        figures(float("nan")),
        figures(float("-inf")),
    ],
)
async def test_figures_of_another_form_are_refused_and_break_nothing(
    fake_engine: FakeEngine, says: str
) -> None:
    engine = VllmEngine(fake_engine.address)
    fake_engine.faults = Faults(says=figures(-1.5))
    assert await engine.prompt_logprobs("tiny", [[1, 2]]) == [[-1.5]]
    fake_engine.faults = Faults(says=says)
    with pytest.raises(EngineRefused):
        await engine.prompt_logprobs("tiny", [[1, 2]])
    await engine.close()


def test_an_error_that_is_too_deep_to_read_is_told_in_part() -> None:
    assert error_message("[" * 100_000) == "[" * 500


@pytest.mark.anyio
@pytest.mark.parametrize("status", [401, 404, 500, 502])
async def test_what_is_no_refusal_of_the_request_tells_nothing_about_tools(status: int) -> None:
    engine = VllmEngine(EngineAddress("engine-0", "http://nowhere"))

    async def refuse(*_: Any) -> tuple[int, str]:
        raise EngineRefused(status, "Bad Gateway")

    engine._call = refuse  # type: ignore[method-assign] - the seam below HTTP
    with pytest.raises(EngineRefused):
        await engine.parses_tools("tiny")
