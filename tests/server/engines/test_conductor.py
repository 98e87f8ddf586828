"""Engines that are met, restart, hang, and are restored."""

from __future__ import annotations

import asyncio

import pytest

from feedback.errors import NotReady
from server.engines.base import EngineAddress, EngineRefused, EngineUnreachable
from server.engines.picture import EngineStatus
from tests.engine_world import SlotsEngine, Weights, World, looked_at

pytestmark = pytest.mark.anyio


async def test_an_engine_that_cannot_unload_keeps_the_others_from_nothing() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.conductor.reconcile()
    await world.conductor.prepare(Weights(1))

    async def refuse(_name: str) -> None:
        raise EngineRefused(500, "no")

    world.engines[0].unload = refuse  # type: ignore[method-assign] - this engine alone
    await world.conductor.trim()
    assert world.engines[1].slots.served == {}
    await looked_at(world.member)
    assert world.adapters == {Weights(1).engine_name: None}  # it is there, and unproven
    assert world.picture.is_ready


async def test_a_restarted_engine_is_restored_before_it_is_ready_again() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    await world.promote(2)
    engine = world.engines[0]
    engine.restart()
    engine.applies = False
    await world.conductor.reconcile()
    assert world.view.status is EngineStatus.FAILED
    assert "still answers like the base" in world.view.reason
    engine.applies = True
    await world.conductor.reconcile()
    assert world.view.status is EngineStatus.FAILED  # tried again after a while, not at once
    world.time += 20
    await world.conductor.reconcile()
    assert world.view.status is EngineStatus.READY
    assert list(engine.slots.served) == [Weights(2).engine_name, Weights(1).engine_name]


async def test_a_gateway_that_restarts_beside_a_running_engine_proves_without_loading() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    loads = world.engines[0].slots.loads
    successor = World(engines=world.engines, roles=world.roles)
    await successor.conductor.reconcile()
    assert successor.picture.serves(Weights(1))
    assert world.engines[0].slots.loads == loads


async def test_a_look_at_a_hung_engine_holds_up_no_other() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    hung, other = world.engines

    async def hang() -> None:
        await asyncio.Event().wait()

    hung.find_fault = hang  # type: ignore[assignment, method-assign] - this engine alone
    following = asyncio.create_task(world.conductor.follow(0.001))
    async with asyncio.timeout(5):
        while not world.picture.is_ready:
            await asyncio.sleep(0)
        other.restart()
        boots = str(other.boots)
        while world.picture.engines["engine-1"].boot_id != boots:
            await asyncio.sleep(0.001)
    following.cancel()
    await world.close()


async def test_an_adapter_that_loads_while_its_engine_is_met_again_stays_in_the_mirror() -> None:
    world = World()
    await world.conductor.reconcile()
    engine = world.engines[0]
    engine.loading = asyncio.Event()
    preparing = asyncio.create_task(world.conductor.prepare(Weights(1)))
    async with asyncio.timeout(5):
        await engine.asked_to_load.wait()
        engine.boots += 1
        reconciling = asyncio.create_task(world.conductor.reconcile())
        while world.view.status is EngineStatus.READY:
            await asyncio.sleep(0)
        for _ in range(10):  # as far as it comes
            await asyncio.sleep(0)
        engine.loading.set()
        await preparing
        await reconciling
    assert set(world.adapters) == set(engine.slots.served) == {Weights(1).engine_name}


async def test_a_load_that_fails_takes_the_engine_from_nobody() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)

    async def break_off(_name: str, _path: str) -> None:
        raise EngineUnreachable("reset")

    world.engines[0].load = break_off  # type: ignore[method-assign] - this engine alone
    with pytest.raises(NotReady, match="no engine could load 'assistant@2'"):
        await world.conductor.prepare(Weights(2))
    assert world.picture.serves(Weights(1))
    await looked_at(world.member)
    assert world.picture.serves(Weights(1))


async def test_requests_prefer_an_engine_on_which_no_load_has_just_failed() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.conductor.reconcile()
    looking = asyncio.Event()

    async def break_off(_name: str, _path: str) -> None:
        raise EngineUnreachable("reset")

    async def hang() -> str | None:
        await looking.wait()
        return None

    world.engines[0].load = break_off  # type: ignore[method-assign] - this engine alone
    world.engines[0].find_fault = hang  # type: ignore[method-assign] - this engine alone
    await world.conductor.prepare(Weights(2))
    assert world.chooser.choose("tiny").id == "engine-1"
    looking.set()
    await looked_at(world.member)
    assert world.chooser.choose("tiny").id == "engine-0"


async def test_an_engine_that_was_replaced_is_looked_at_no_more() -> None:
    world = World()
    await world.conductor.reconcile()
    before, member = world.engines[0], world.member
    began, broke = asyncio.Event(), asyncio.Event()

    async def break_off(_name: str, _path: str) -> None:
        began.set()
        await broke.wait()
        raise EngineUnreachable("reset")

    before.load = break_off  # type: ignore[method-assign] - this engine alone
    preparing = asyncio.ensure_future(world.conductor.prepare(Weights(2)))
    await began.wait()
    after = SlotsEngine()
    after.address = EngineAddress("engine-0", "http://elsewhere")
    world.engines[0] = after
    await world.conductor.reconcile()
    broke.set()
    with pytest.raises(NotReady):
        await preparing
    assert world.member is not member
    assert (member.look, member.doubts) == (None, 0)


async def test_one_engine_s_trouble_is_not_the_other_s() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    world.engines[0].list_models = _broken  # type: ignore[method-assign] - this engine alone
    await world.conductor.reconcile()
    assert world.chooser.choose("tiny").id == "engine-1"
    assert "KeyError" in world.view.reason


async def _broken() -> dict[str, str]:
    raise KeyError("data")
