"""Releases that requests name themselves."""

from __future__ import annotations

import asyncio

import pytest

from feedback.errors import NotReady
from server.engines.loading import Unfit
from tests.engine_world import CAPACITY, Weights, World

pytestmark = pytest.mark.anyio


async def test_what_a_request_holds_is_unloaded_by_no_trim_and_no_other_pin() -> None:
    world = World()
    await world.conductor.reconcile()
    hold = world.chooser.holding()
    await world.pins.pin(Weights(1), hold)
    await world.conductor.trim()
    for number in range(2, 9):
        other = world.chooser.holding()
        await world.pins.pin(Weights(number), other)
        other.end()
    assert world.picture.serves(Weights(1))
    hold.end()
    hold.end()  # once is enough, and twice is no more
    await world.conductor.trim()
    assert world.adapters == {}


async def test_a_pin_during_the_unloading_of_its_release_waits_and_loads_it_again() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.conductor.prepare(Weights(1))
    await world.conductor.prepare(Weights(2))
    engine, hold, kept = world.engines[0], world.chooser.holding(), world.chooser.holding()
    engine.unloading = asyncio.Event()
    trimming = asyncio.create_task(world.conductor.trim())
    async with asyncio.timeout(5):
        await engine.asked_to_unload.wait()
        assert not world.picture.serves(Weights(1))
        await world.pins.pin(Weights(2), kept)  # not yet unloaded, and now it stays
        pinning = asyncio.create_task(world.pins.pin(Weights(1), hold))
        engine.unloading.set()
        await trimming
        await pinning
    assert world.picture.serves(Weights(1))
    assert world.picture.serves(Weights(2))
    assert set(world.adapters) == set(engine.slots.served)


async def test_what_has_lost_its_role_stays_while_a_request_holds_it() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    hold = world.chooser.holding()
    hold.take(Weights(1))
    await world.promote(2)
    await world.promote(3)  # the second move: no role is left
    assert world.picture.serves(Weights(1))
    hold.end()
    await world.conductor.trim()
    assert not world.picture.serves(Weights(1))


@pytest.mark.parametrize("roles", [0, 1, 2, 3])
async def test_pins_use_what_roles_leave_and_never_the_evaluation_slot(roles: int) -> None:
    world = World(roles=[Weights(n) for n in range(1, roles + 1)] or [Weights(0)])
    await world.conductor.reconcile()
    left = CAPACITY - 1 - roles
    holds = [world.chooser.holding() for _ in range(left + 1)]
    for number, hold in enumerate(holds[:-1]):
        await world.pins.pin(Weights(10 + number), hold)
    with pytest.raises(NotReady, match="one is for evaluations") as refused:
        await world.pins.pin(Weights(20), holds[-1])
    assert refused.value.code == "no_adapter_slot"
    await world.conductor.take_evaluation_slot(Weights(30), "a", 60)
    await world.pins.pin(Weights(30), holds[-1])  # what is under evaluation has its slot
    assert all(world.picture.serves(Weights(10 + number)) for number in range(left))


async def test_a_pin_that_proved_unfit_is_tried_again_after_a_while_alone() -> None:
    world = World()
    await world.conductor.reconcile()
    engine, hold = world.engines[0], world.chooser.holding()
    engine.applies = False
    for _ in range(3):
        with pytest.raises(Unfit, match="still answers like the base") as refused:
            await world.pins.pin(Weights(1), hold)
        assert refused.value.code == "not_active"
        hold.end()
    assert engine.slots.loads == 1
    engine.applies = True
    world.time += 20
    await world.pins.pin(Weights(1), hold)
    assert world.picture.serves(Weights(1))
