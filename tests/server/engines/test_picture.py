"""What follows from the picture of the engines alone."""

from __future__ import annotations

import pytest

from feedback.errors import NotReady
from tests.engine_world import SlotsEngine, World

pytestmark = pytest.mark.anyio


async def test_no_engine_and_one_that_is_not_ready_are_503() -> None:
    world = World(engines=[])
    with pytest.raises(NotReady, match="no engine is there yet"):
        world.chooser.choose("tiny")
    world.engines = [SlotsEngine()]
    world.engines[0].healthy = False
    await world.conductor.reconcile()
    with pytest.raises(NotReady, match="engine-0 is loading: nothing listens"):
        world.chooser.choose("tiny")
    world.engines[0].healthy = True
    await world.conductor.reconcile()
    assert world.chooser.choose("tiny").id == "engine-0"


async def test_a_503_says_the_state_of_a_few_engines_in_few_words() -> None:
    world = World(engines=[SlotsEngine(f"engine-{n}") for n in range(40)])
    for engine in world.engines:
        engine.healthy = False
        engine.fault = "x" * 5000
    await world.conductor.reconcile()
    with pytest.raises(NotReady, match=r"engine-0 is loading: x+…; .*; 37 more\)") as refused:
        world.chooser.choose("tiny")
    assert len(refused.value.message) < 1000
