"""Which engine a request gets, and what a failed one brings about."""

from __future__ import annotations

from contextlib import suppress

import pytest

from server.engines.picture import EngineStatus
from tests.engine_world import SlotsEngine, Weights, World, looked_at

pytestmark = pytest.mark.anyio


async def test_the_least_busy_engine_is_chosen_and_counts_end_with_the_block() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.conductor.reconcile()
    first = world.chooser.choose("tiny")
    with suppress(ZeroDivisionError), world.chooser.run(first, "tiny"):
        assert world.chooser.choose("tiny") is not first
        raise ZeroDivisionError
    assert world.chooser.choose("tiny") is first
    assert first.running == {}


async def test_an_engine_that_failed_a_request_and_is_well_keeps_traffic_and_proofs() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    engine, proofs = world.engines[0], dict(world.adapters)
    loads, engine.probes = engine.slots.loads, 0
    for _ in range(3):
        world.chooser.suspect(world.replica, "it hung up")
        assert world.picture.serves(Weights(1))  # meanwhile too
    await looked_at(world.replica)
    assert world.chooser.choose(Weights(1).engine_name) is world.replica
    assert (dict(world.adapters), engine.slots.loads, engine.probes) == (proofs, loads, 0)


async def test_a_suspected_engine_that_is_not_well_is_taken_out_and_returns_with_its_proofs() -> (
    None
):
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    engine = world.engines[0]
    engine.healthy, engine.probes = False, 0
    world.chooser.suspect(world.replica, "it hung up")
    await looked_at(world.replica)
    assert world.view.status is EngineStatus.FAILED
    engine.healthy = True
    await world.conductor.reconcile()
    assert world.picture.serves(Weights(1))
    assert engine.probes == 0


async def test_a_suspected_engine_that_is_another_process_is_restored_and_proven_anew() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    engine = world.engines[0]
    engine.restart()
    engine.probes = 0
    world.chooser.suspect(world.replica, "it hung up")
    await looked_at(world.replica)
    assert world.picture.serves(Weights(1))
    assert list(engine.slots.served) == [Weights(1).engine_name]
    assert engine.probes == 2  # the base and the adapter


async def test_what_a_suspected_engine_has_forgotten_is_loaded_again_and_nothing_else() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    await world.promote(2)
    engine = world.engines[0]
    del engine.slots.served[Weights(1).engine_name]  # by another gateway
    engine.slots.load("assistant-9-0000", "weights-9")  # likewise
    engine.probes, loads = 0, engine.slots.loads
    world.chooser.suspect(world.replica, "unknown name")
    await looked_at(world.replica)
    assert world.picture.serves(Weights(1))
    assert set(world.adapters) == set(engine.slots.served)
    assert (engine.slots.loads, engine.probes) == (loads + 1, 1)


async def test_requests_prefer_an_engine_that_is_not_suspected() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.conductor.reconcile()
    first, other = world.chooser.replicas.values()
    world.chooser.suspect(first, "it hung up")
    with world.chooser.run(other, "tiny"):
        assert world.chooser.choose("tiny") is other
        await looked_at(first)
        assert world.chooser.choose("tiny") is first
