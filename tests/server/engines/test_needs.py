"""What stays on the engines whatever requests do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from feedback.errors import Conflict, NotReady
from server.engines.loading import Unfit
from tests.engine_world import Weights, World

pytestmark = pytest.mark.anyio


async def test_the_time_in_the_evaluation_slot_begins_when_its_release_is_loaded() -> None:
    world = World()
    await world.conductor.reconcile()
    engine = world.engines[0]
    engine.loading = asyncio.Event()
    holding = asyncio.create_task(world.conductor.take_evaluation_slot(Weights(1), "a", 60))
    async with asyncio.timeout(5):
        await engine.asked_to_load.wait()
        world.time += 100
        with pytest.raises(NotReady) as refused:
            await world.conductor.take_evaluation_slot(Weights(2), "b", 60)
        assert refused.value.code == "evaluation_slot_taken"
        engine.loading.set()
        slot = await holding
    assert slot.expires_at == world.time + 60


async def test_a_release_on_its_way_to_a_role_outlives_the_trim_of_another_move() -> None:
    world = World()
    await world.conductor.reconcile()
    with world.conductor.keep(Weights(1)):
        await world.conductor.prepare(Weights(1))
        await world.conductor.trim()
        assert world.picture.serves(Weights(1))


async def test_the_evaluation_slot_is_held_by_one_release_until_its_time_ends() -> None:
    world = World()
    await world.conductor.reconcile()
    slot = await world.conductor.take_evaluation_slot(Weights(1), "a", 60)
    await world.conductor.trim()
    assert world.picture.serves(Weights(1))
    with pytest.raises(NotReady) as refused:
        await world.conductor.take_evaluation_slot(Weights(2), "b", 60)
    assert refused.value.code == "evaluation_slot_taken"
    world.time = 50
    world.conductor.renew_evaluation_slot(slot.token, 60)
    world.time = 100
    with pytest.raises(NotReady):
        await world.conductor.take_evaluation_slot(Weights(2), "b", 60)
    world.time = 111
    await world.conductor.take_evaluation_slot(Weights(2), "b", 60)
    with pytest.raises(Conflict) as ended:
        world.conductor.renew_evaluation_slot(slot.token, 60)
    assert ended.value.code == "slot_ended"
    world.conductor.give_evaluation_slot_back("b")
    await world.conductor.trim()
    assert world.adapters == {}


async def test_noise_is_tolerated_for_an_evaluation_and_its_release_answers_nobody_else() -> None:
    world = World()
    await world.conductor.reconcile()
    engine = world.engines[0]
    exact = engine.prompt_logprobs

    async def noisy(model: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        figures = await exact(model, prompts)
        return [[x + (3 if i % 2 else -3) for i, x in enumerate(row)] for row in figures]

    engine.prompt_logprobs = noisy  # type: ignore[method-assign] - this engine alone
    await world.conductor.take_evaluation_slot(Weights(1), "a", 60)
    assert world.picture.serves(Weights(1), tolerate_noise=True)
    assert not world.picture.serves(Weights(1))
    with pytest.raises(Unfit) as refused:
        await world.conductor.prepare(Weights(1))
    assert refused.value.code == "unproven"
    assert world.picture.serves(Weights(1), tolerate_noise=True)  # the evaluation goes on
    world.conductor.loader.traits = {"dtype": "bfloat16"}
    await world.conductor.reconcile()
    assert world.picture.serves(Weights(1, {"dtype": "bfloat16", "by": "admin"}))
    assert not world.picture.serves(Weights(1, {"dtype": "float32", "by": "admin"}))
