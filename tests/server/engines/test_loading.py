"""What is loaded where and proven there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from feedback.errors import NotReady
from server.engines.chooser import Hold
from server.engines.loading import Unfit
from tests.engine_world import CAPACITY, Weights, World

pytestmark = pytest.mark.anyio
T = TypeVar("T")


async def test_a_release_is_chosen_only_where_it_is_loaded_and_proven() -> None:
    world = World()
    await world.conductor.reconcile()
    world.engines[0].loading = asyncio.Event()
    preparing = asyncio.create_task(world.conductor.prepare(Weights(1)))
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        world.chooser.choose(Weights(1).engine_name)
    world.engines[0].loading.set()
    proofs = await preparing
    assert proofs["engine-0"].to_adapter == 0
    assert world.picture.serves(Weights(1))


async def test_what_has_a_role_is_used_again_before_anything_new_is_loaded() -> None:
    """Else the engine would evict it: its order of use still has names that were unloaded."""
    world = World()
    await world.conductor.reconcile()
    await world.promote(1)
    await world.promote(2)
    for number in range(10, 20):
        await world.conductor.prepare(Weights(number))
        in_memory = world.engines[0].slots.in_memory
        assert {Weights(1).engine_name, Weights(2).engine_name} <= set(in_memory)
    assert len(world.adapters) == CAPACITY


async def test_with_every_slot_needed_a_further_release_is_refused() -> None:
    world = World(roles=[Weights(n) for n in range(1, CAPACITY + 1)])
    await world.conductor.reconcile()
    with pytest.raises(NotReady) as refused:
        await world.conductor.prepare(Weights(9))
    assert refused.value.code == "no_adapter_slot"


async def test_a_running_answer_s_adapter_is_not_unloaded_until_it_ends() -> None:
    world = World()
    await world.conductor.reconcile()
    await world.conductor.prepare(Weights(1))
    with world.chooser.run(world.replica, Weights(1).engine_name):
        await world.conductor.trim()
        assert Weights(1).engine_name in world.engines[0].slots.served
    await world.conductor.trim()
    assert world.engines[0].slots.served == {}


async def test_an_engine_with_fewer_slots_than_the_settings_say_is_given_no_more() -> None:
    world = World()
    world.engines[0].max_loras = 2
    await world.conductor.reconcile()
    await world.promote(1)
    for number in range(2, 6):
        await world.conductor.prepare(Weights(number))
        assert len(world.adapters) == 2
        assert world.picture.serves(Weights(1))
    with pytest.raises(NotReady, match="need 1 of 2 and one is for evaluations"):
        await world.pins.pin(Weights(9), world.chooser.holding())
    world.engines[0].max_loras = 9
    assert world.conductor.loader.slots(world.member.mirror) == CAPACITY  # never more than was set


async def test_a_release_without_reference_figures_is_unfit_and_breaks_nothing_else() -> None:
    world = World()
    await world.conductor.reconcile()
    with pytest.raises(Unfit) as refused:
        await world.conductor.prepare(Weights(404))
    assert refused.value.code == "adapter_missing"
    await world.conductor.prepare(Weights(1))
    assert world.picture.serves(Weights(1))


class Slotting(RuleBasedStateMachine):
    """Promise 9: never more adapters than slots, and what has a role is never evicted."""

    numbers = st.integers(1, 9)

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World()
        self.running: list[tuple[Any, str]] = []
        self.holds: list[tuple[Hold, int]] = []
        self.evaluations = 0
        self.do(self.world.conductor.reconcile())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        for context, _ in self.running:
            context.__exit__(None, None, None)
        self.loop.close()

    @rule(number=numbers)
    def promote(self, number: int) -> None:
        if number != self.world.roles[0].number:
            with suppress(NotReady):
                self.do(self.world.promote(number))

    @rule(number=numbers)
    def canary(self, number: int) -> None:
        if number not in self.claimed():
            with suppress(NotReady):
                self.do(self.world.canary(number))

    @precondition(lambda self: len(self.world.roles) > 1)
    @rule()
    def roll_back(self) -> None:
        loads = self.world.engines[0].slots.loads
        self.world.assign(self.world.roles[1::-1])
        assert self.world.picture.serves(self.world.roles[0])
        assert self.world.engines[0].slots.loads == loads

    @rule(number=numbers, stays=st.booleans())
    def pin(self, number: int, stays: bool) -> None:
        hold = self.world.chooser.holding()
        try:
            self.do(self.world.pins.pin(Weights(number), hold))
        except NotReady:
            assert len(self.needed() | {number}) > CAPACITY - 1
        else:
            if stays:
                self.holds.append((hold, number))
                return
        hold.end()

    @precondition(lambda self: self.holds)
    @rule()
    def end_pin(self) -> None:
        self.holds.pop()[0].end()

    def claimed(self) -> set[int]:
        return {release.number for release in self.world.roles if release.number}

    def held(self) -> set[int]:
        return {number for _, number in self.holds}

    def needed(self) -> set[int]:
        running = {int(name.split("-")[1]) for _, name in self.running}
        return self.claimed() | self.held() | running

    @rule(number=numbers)
    def evaluate(self, number: int) -> None:
        self.evaluations += 1
        token = str(self.evaluations)
        try:
            self.do(self.world.conductor.take_evaluation_slot(Weights(number), token, 10))
        except NotReady as refused:
            # Requests that run on what had a role may need it; pins alone never do.
            if refused.code == "no_adapter_slot":
                assert len(self.needed()) > CAPACITY - 1

    @rule(number=numbers)
    def begin(self, number: int) -> None:
        world, name = self.world, Weights(number).engine_name
        if world.picture.serves(Weights(number)) and len(self.running) < 2:
            slots = self.world.engines[0].slots
            context = world.chooser.run(world.chooser.choose(name), name)
            context.__enter__()
            slots.use(slots.served[name])
            slots.start(slots.served[name])
            self.running.append((context, name))

    @precondition(lambda self: self.running)
    @rule()
    def end(self) -> None:
        context, name = self.running.pop()
        slots = self.world.engines[0].slots
        slots.stop(slots.served[name])
        context.__exit__(None, None, None)

    @rule()
    def wait(self) -> None:
        self.world.time += 6

    @precondition(lambda self: not self.running and not self.holds)
    @rule()
    def restart(self) -> None:
        self.world.engines[0].restart()
        self.do(self.world.conductor.reconcile())

    @invariant()
    def no_more_than_slots_and_the_mirror_is_true(self) -> None:
        slots, loaded = self.world.engines[0].slots, self.world.adapters
        assert set(loaded) == set(slots.served)
        assert len(loaded) <= CAPACITY
        for name, proof in loaded.items():
            assert proof is not None
            assert slots.served[name].path == f"weights-{name.split('-')[1]}"

    @invariant()
    def what_has_a_role_or_runs_is_in_the_engine_s_memory(self) -> None:
        needed = {r.engine_name for r in self.world.roles if r.number}
        needed |= {name for _, name in self.running}
        needed |= {Weights(number).engine_name for number in self.held()}
        assert needed <= set(self.world.engines[0].slots.in_memory)


TestSlotting = Slotting.TestCase
TestSlotting.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
