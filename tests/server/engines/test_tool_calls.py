"""Whether engines call tools."""

from __future__ import annotations

import asyncio

import pytest

from server.engines.base import EngineRefused
from server.engines.picture import Picture
from tests.engine_world import CAPACITY, World

pytestmark = pytest.mark.anyio


async def test_an_engine_is_asked_once_whether_it_calls_tools_however_many_want_to_know() -> None:
    world = World()
    await world.conductor.reconcile()
    asked, answers = 0, asyncio.Event()

    async def answer(_model: str) -> bool:
        nonlocal asked
        asked += 1
        await answers.wait()
        if asked == 1:
            raise EngineRefused(502, "Bad Gateway")
        return True

    world.engines[0].parses_tools = answer  # type: ignore[attr-defined] - this engine alone
    waiting = [asyncio.ensure_future(world.tool_calls.are_parsed()) for _ in range(3)]
    await asyncio.sleep(0)
    answers.set()
    assert await asyncio.gather(*waiting) == [None] * 3
    assert (await world.tool_calls.are_parsed(), asked) == (None, 1)
    world.engines[0].restart()
    await world.conductor.reconcile()
    assert (await world.tool_calls.are_parsed(), asked) == (True, 2)


async def test_an_engine_that_goes_while_it_is_asked_is_no_fault_of_the_question() -> None:
    world = World()
    await world.conductor.reconcile()
    asked = asyncio.ensure_future(world.tool_calls.are_parsed())
    await asyncio.sleep(0)  # the questions are made, and none has begun
    world.chooser.show(Picture("tiny", CAPACITY))
    assert await asked is None
