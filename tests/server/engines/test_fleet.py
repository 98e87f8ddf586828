"""What is loaded where, proven there, and running there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from feedback.errors import Conflict, NotReady
from server.engines.base import EngineAddress, EngineRefused, EngineUnreachable
from server.engines.fleet import EngineStatus, Fleet, Hold, Member, Unfit
from server.engines.reasons import in_public
from tests.fake_engine.weights import BASE, Slots, fake_logprobs

pytestmark = pytest.mark.anyio
T = TypeVar("T")
CAPACITY = 4
PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7]]


@dataclass(frozen=True)
class Weights:
    """A release; its number is its weights."""

    number: int
    acceptance: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"assistant@{self.number}"

    @property
    def engine_name(self) -> str:
        return f"assistant-{self.number}-0000" if self.number else "tiny"

    @property
    def adapter_id(self) -> str | None:
        return f"ad_{self.number}" if self.number else None

    @property
    def adapter_hash(self) -> str | None:
        return f"weights-{self.number}" if self.number else None


class SlotsEngine:
    """The fake engine's slots behind the seam, without a server between."""

    def __init__(self, id: str = "engine-0", capacity: int = CAPACITY) -> None:
        self.address = EngineAddress(id, "http://nowhere")
        self.capacity = capacity
        self.max_loras: int | None = None
        self.healthy = True
        self.fault = "nothing listens"
        self.applies = True
        self.probes = 0
        self.asked_to_load = asyncio.Event()
        self.unloading: asyncio.Event | None = None
        self.asked_to_unload = asyncio.Event()
        self.loading: asyncio.Event | None = None
        self.restart()

    def restart(self) -> None:
        self.slots = Slots(self.capacity, self.capacity, lambda path: path)
        self.boots = getattr(self, "boots", 0) + 1

    async def find_fault(self) -> str | None:
        return None if self.healthy else self.fault

    async def boot_id(self) -> str:
        if not self.healthy:
            raise EngineUnreachable("gone")
        return str(self.boots)

    async def list_models(self) -> dict[str, str]:
        return {"tiny": "/m", **{name: a.path for name, a in self.slots.served.items()}}

    async def load(self, name: str, path: str) -> None:
        self.asked_to_load.set()
        if self.loading is not None:
            await self.loading.wait()
        if name in self.slots.served:
            raise EngineRefused(400, "has already been loaded")
        self.slots.load(name, path if self.applies else BASE)

    async def unload(self, name: str) -> None:
        self.asked_to_unload.set()
        if self.unloading is not None:
            await self.unloading.wait()
        if self.slots.served.pop(name, None) is None:
            raise EngineRefused(404, "cannot be found")

    async def touch(self, name: str) -> None:
        self.slots.use(self.slots.served[name])

    max_model_len = None

    async def tokenize(
        self, model: str, messages: Sequence[Mapping[str, Any]], **_: Any
    ) -> list[int]:
        raise NotImplementedError

    async def tokenize_text(self, model: str, text: str) -> list[int]:
        raise NotImplementedError

    async def prompt_logprobs(
        self, model: str, prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        self.probes += 1
        signature = BASE if model == "tiny" else self.slots.use(self.slots.served[model])
        return [fake_logprobs(signature, ids) for ids in prompts]

    @contextmanager
    def post(self, *_: Any, **__: Any) -> Iterator[AsyncIterator[bytes]]:
        raise NotImplementedError

    async def close(self) -> None:
        pass


@dataclass
class World:
    """A fleet over engines, with roles that tests move."""

    engines: list[SlotsEngine] = field(default_factory=lambda: [SlotsEngine()])
    roles: list[Weights] = field(default_factory=lambda: [Weights(0)])
    time: float = 0.0

    def __post_init__(self) -> None:
        self.fleet = Fleet(
            base_name="tiny",
            capacity=CAPACITY,
            addresses=lambda: [engine.address for engine in self.engines],
            connect=lambda address: next(e for e in self.engines if e.address == address),
            reference=self.reference,
            path=lambda content_hash: content_hash,
            required=lambda: self.roles[:1],
            wanted=lambda: self.roles,
            monotonic=lambda: self.time,
        )

    def reference(self, adapter_id: str) -> Mapping[str, Any]:
        signature = f"weights-{adapter_id.removeprefix('ad_')}"
        if signature == "weights-404":
            raise OSError("no reference figures")
        return {
            "prompts": PROMPTS,
            "base": [fake_logprobs(BASE, ids) for ids in PROMPTS],
            "adapter": [fake_logprobs(signature, ids) for ids in PROMPTS],
        }

    @property
    def member(self) -> Member:
        return self.fleet.members["engine-0"]

    async def promote(self, number: int) -> None:
        release = Weights(number)
        with self.fleet.keep(release):
            await self.fleet.prepare(release)
            self.roles = [release, self.roles[0]]
        await self.fleet.trim()

    async def canary(self, number: int) -> None:
        release = Weights(number)
        with self.fleet.keep(release):
            await self.fleet.prepare(release)
            self.roles = [*(self.roles * 2)[:2], release]
        await self.fleet.trim()


async def test_no_engine_and_one_that_is_not_ready_are_503() -> None:
    world = World(engines=[])
    with pytest.raises(NotReady, match="no engine is there yet"):
        world.fleet.choose("tiny")
    world.engines = [SlotsEngine()]
    world.engines[0].healthy = False
    await world.fleet.reconcile()
    with pytest.raises(NotReady, match="engine-0 is loading: nothing listens"):
        world.fleet.choose("tiny")
    world.engines[0].healthy = True
    await world.fleet.reconcile()
    assert world.fleet.choose("tiny").id == "engine-0"


async def test_a_release_is_chosen_only_where_it_is_loaded_and_proven() -> None:
    world = World()
    await world.fleet.reconcile()
    world.engines[0].loading = asyncio.Event()
    preparing = asyncio.create_task(world.fleet.prepare(Weights(1)))
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        world.fleet.choose(Weights(1).engine_name)
    world.engines[0].loading.set()
    proofs = await preparing
    assert proofs["engine-0"].to_adapter == 0
    assert world.fleet.serves(Weights(1))


async def test_the_least_busy_engine_is_chosen_and_counts_end_with_the_block() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.fleet.reconcile()
    first = world.fleet.choose("tiny")
    with suppress(ZeroDivisionError), world.fleet.run(first, "tiny"):
        assert world.fleet.choose("tiny") is not first
        raise ZeroDivisionError
    assert world.fleet.choose("tiny") is first
    assert first.running == {}


async def test_what_has_a_role_is_used_again_before_anything_new_is_loaded() -> None:
    """Else the engine would evict it: its order of use still has names that were unloaded."""
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    await world.promote(2)
    for number in range(10, 20):
        await world.fleet.prepare(Weights(number))
        in_memory = world.engines[0].slots.in_memory
        assert {Weights(1).engine_name, Weights(2).engine_name} <= set(in_memory)
    assert len(world.member.loaded) == CAPACITY


async def test_with_every_slot_needed_a_further_release_is_refused() -> None:
    world = World(roles=[Weights(n) for n in range(1, CAPACITY + 1)])
    await world.fleet.reconcile()
    with pytest.raises(NotReady) as refused:
        await world.fleet.prepare(Weights(9))
    assert refused.value.code == "no_adapter_slot"


async def test_what_a_request_holds_is_unloaded_by_no_trim_and_no_other_pin() -> None:
    world = World()
    await world.fleet.reconcile()
    hold = world.fleet.holding()
    await world.fleet.pin(Weights(1), hold)
    await world.fleet.trim()
    for number in range(2, 9):
        other = world.fleet.holding()
        await world.fleet.pin(Weights(number), other)
        other.end()
    assert world.fleet.serves(Weights(1))
    hold.end()
    hold.end()  # once is enough, and twice is no more
    await world.fleet.trim()
    assert world.member.loaded == {}


async def test_a_pin_during_the_unloading_of_its_release_waits_and_loads_it_again() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.fleet.prepare(Weights(1))
    await world.fleet.prepare(Weights(2))
    engine, hold, kept = world.engines[0], world.fleet.holding(), world.fleet.holding()
    engine.unloading = asyncio.Event()
    trimming = asyncio.create_task(world.fleet.trim())
    async with asyncio.timeout(5):
        await engine.asked_to_unload.wait()
        assert not world.fleet.serves(Weights(1))
        await world.fleet.pin(Weights(2), kept)  # not yet unloaded, and now it stays
        pinning = asyncio.create_task(world.fleet.pin(Weights(1), hold))
        engine.unloading.set()
        await trimming
        await pinning
    assert world.fleet.serves(Weights(1))
    assert world.fleet.serves(Weights(2))
    assert set(world.member.loaded) == set(engine.slots.served)


async def test_an_engine_that_cannot_unload_keeps_the_others_from_nothing() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.fleet.reconcile()
    await world.fleet.prepare(Weights(1))

    async def refuse(_name: str) -> None:
        raise EngineRefused(500, "no")

    world.engines[0].unload = refuse  # type: ignore[method-assign]
    await world.fleet.trim()
    assert world.engines[1].slots.served == {}
    await looked_at(world.member)
    assert world.member.loaded == {Weights(1).engine_name: None}  # it is there, and unproven
    assert world.fleet.is_ready()


async def test_what_has_lost_its_role_stays_while_a_request_holds_it() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    hold = world.fleet.holding()
    hold.take(Weights(1))
    await world.promote(2)
    await world.promote(3)  # the second move: no role is left
    assert world.fleet.serves(Weights(1))
    hold.end()
    await world.fleet.trim()
    assert not world.fleet.serves(Weights(1))


@pytest.mark.parametrize("roles", [0, 1, 2, 3])
async def test_pins_use_what_roles_leave_and_never_the_evaluation_slot(roles: int) -> None:
    world = World(roles=[Weights(n) for n in range(1, roles + 1)] or [Weights(0)])
    await world.fleet.reconcile()
    left = CAPACITY - 1 - roles
    holds = [world.fleet.holding() for _ in range(left + 1)]
    for number, hold in enumerate(holds[:-1]):
        await world.fleet.pin(Weights(10 + number), hold)
    with pytest.raises(NotReady, match="one is for evaluations") as refused:
        await world.fleet.pin(Weights(20), holds[-1])
    assert refused.value.code == "no_adapter_slot"
    await world.fleet.hold_evaluation_slot(Weights(30), "a", 60)
    await world.fleet.pin(Weights(30), holds[-1])  # what is under evaluation has its slot
    assert all(world.fleet.serves(Weights(10 + number)) for number in range(left))


async def test_a_pin_that_proved_unfit_is_tried_again_after_a_while_alone() -> None:
    world = World()
    await world.fleet.reconcile()
    engine, hold = world.engines[0], world.fleet.holding()
    engine.applies = False
    for _ in range(3):
        with pytest.raises(Unfit, match="still answers like the base") as refused:
            await world.fleet.pin(Weights(1), hold)
        assert refused.value.code == "not_active"
        hold.end()
    assert engine.slots.loads == 1
    engine.applies = True
    world.time += 20
    await world.fleet.pin(Weights(1), hold)
    assert world.fleet.serves(Weights(1))


async def test_the_time_of_a_lease_begins_when_its_release_is_loaded() -> None:
    world = World()
    await world.fleet.reconcile()
    engine = world.engines[0]
    engine.loading = asyncio.Event()
    holding = asyncio.create_task(world.fleet.hold_evaluation_slot(Weights(1), "a", 60))
    async with asyncio.timeout(5):
        await engine.asked_to_load.wait()
        world.time += 100
        with pytest.raises(NotReady) as refused:
            await world.fleet.hold_evaluation_slot(Weights(2), "b", 60)
        assert refused.value.code == "evaluation_slot_taken"
        engine.loading.set()
        lease = await holding
    assert lease.expires_at == world.time + 60


async def test_a_running_answer_s_adapter_is_not_unloaded_until_it_ends() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.fleet.prepare(Weights(1))
    with world.fleet.run(world.member, Weights(1).engine_name):
        await world.fleet.trim()
        assert Weights(1).engine_name in world.engines[0].slots.served
    await world.fleet.trim()
    assert world.engines[0].slots.served == {}


async def test_a_release_on_its_way_to_a_role_outlives_the_trim_of_another_move() -> None:
    world = World()
    await world.fleet.reconcile()
    with world.fleet.keep(Weights(1)):
        await world.fleet.prepare(Weights(1))
        await world.fleet.trim()
        assert world.fleet.serves(Weights(1))


async def test_the_evaluation_slot_is_held_by_one_release_until_its_lease_ends() -> None:
    world = World()
    await world.fleet.reconcile()
    lease = await world.fleet.hold_evaluation_slot(Weights(1), "a", 60)
    await world.fleet.trim()
    assert world.fleet.serves(Weights(1))
    with pytest.raises(NotReady) as refused:
        await world.fleet.hold_evaluation_slot(Weights(2), "b", 60)
    assert refused.value.code == "evaluation_slot_taken"
    world.time = 50
    world.fleet.renew(lease.token, 60)
    world.time = 100
    with pytest.raises(NotReady):
        await world.fleet.hold_evaluation_slot(Weights(2), "b", 60)
    world.time = 111
    await world.fleet.hold_evaluation_slot(Weights(2), "b", 60)
    with pytest.raises(Conflict) as ended:
        world.fleet.renew(lease.token, 60)
    assert ended.value.code == "lease_ended"
    world.fleet.give_back("b")
    await world.fleet.trim()
    assert world.member.loaded == {}


async def test_noise_is_tolerated_for_an_evaluation_and_its_release_answers_nobody_else() -> None:
    world = World()
    await world.fleet.reconcile()
    engine = world.engines[0]
    exact = engine.prompt_logprobs

    async def noisy(model: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        figures = await exact(model, prompts)
        return [[x + (3 if i % 2 else -3) for i, x in enumerate(row)] for row in figures]

    engine.prompt_logprobs = noisy  # type: ignore[method-assign]
    await world.fleet.hold_evaluation_slot(Weights(1), "a", 60)
    assert world.fleet.serves(Weights(1), tolerate_noise=True)
    assert not world.fleet.serves(Weights(1))
    with pytest.raises(Unfit) as refused:
        await world.fleet.prepare(Weights(1))
    assert refused.value.code == "unproven"
    assert world.fleet.serves(Weights(1), tolerate_noise=True)  # the evaluation goes on
    world.fleet.traits = {"dtype": "bfloat16"}
    assert world.fleet.serves(Weights(1, {"dtype": "bfloat16", "by": "admin"}))
    assert not world.fleet.serves(Weights(1, {"dtype": "float32", "by": "admin"}))


async def test_a_restarted_engine_is_restored_before_it_is_ready_again() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    await world.promote(2)
    engine = world.engines[0]
    engine.restart()
    engine.applies = False
    await world.fleet.reconcile()
    assert world.member.status is EngineStatus.FAILED
    assert "still answers like the base" in world.member.reason
    engine.applies = True
    await world.fleet.reconcile()
    assert world.member.status is EngineStatus.FAILED  # tried again after a while, not at once
    world.time += 20
    await world.fleet.reconcile()
    assert world.member.status is EngineStatus.READY
    assert list(engine.slots.served) == [Weights(2).engine_name, Weights(1).engine_name]


async def test_a_gateway_that_restarts_beside_a_running_engine_proves_without_loading() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    loads = world.engines[0].slots.loads
    successor = World(engines=world.engines, roles=world.roles)
    await successor.fleet.reconcile()
    assert successor.fleet.serves(Weights(1))
    assert world.engines[0].slots.loads == loads


async def looked_at(member: Member) -> None:
    """Return when the look that a suspicion began has ended."""
    assert member.look is not None
    async with asyncio.timeout(5):
        await member.look


async def test_an_engine_that_failed_a_request_and_is_well_keeps_traffic_and_proofs() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    engine, proofs = world.engines[0], dict(world.member.loaded)
    loads, engine.probes = engine.slots.loads, 0
    for _ in range(3):
        world.fleet.suspect(world.member, "it hung up")
        assert world.fleet.serves(Weights(1))  # meanwhile too
    await looked_at(world.member)
    assert world.fleet.choose(Weights(1).engine_name) is world.member
    assert (dict(world.member.loaded), engine.slots.loads, engine.probes) == (proofs, loads, 0)


async def test_a_suspected_engine_that_is_not_well_is_taken_out_and_returns_with_its_proofs() -> (
    None
):
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    engine = world.engines[0]
    engine.healthy, engine.probes = False, 0
    world.fleet.suspect(world.member, "it hung up")
    await looked_at(world.member)
    assert world.member.status is EngineStatus.FAILED
    engine.healthy = True
    await world.fleet.reconcile()
    assert world.fleet.serves(Weights(1))
    assert engine.probes == 0


async def test_a_suspected_engine_that_is_another_process_is_restored_and_proven_anew() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    engine = world.engines[0]
    engine.restart()
    engine.probes = 0
    world.fleet.suspect(world.member, "it hung up")
    await looked_at(world.member)
    assert world.fleet.serves(Weights(1))
    assert list(engine.slots.served) == [Weights(1).engine_name]
    assert engine.probes == 2  # the base and the adapter


async def test_what_a_suspected_engine_has_forgotten_is_loaded_again_and_nothing_else() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)
    await world.promote(2)
    engine = world.engines[0]
    del engine.slots.served[Weights(1).engine_name]  # by another gateway
    engine.slots.load("assistant-9-0000", "weights-9")  # likewise
    engine.probes, loads = 0, engine.slots.loads
    world.fleet.suspect(world.member, "unknown name")
    await looked_at(world.member)
    assert world.fleet.serves(Weights(1))
    assert set(world.member.loaded) == set(engine.slots.served)
    assert (engine.slots.loads, engine.probes) == (loads + 1, 1)


async def test_requests_prefer_an_engine_that_is_not_suspected() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    await world.fleet.reconcile()
    first, other = world.fleet.members.values()
    world.fleet.suspect(first, "it hung up")
    with world.fleet.run(other, "tiny"):
        assert world.fleet.choose("tiny") is other
        await looked_at(first)
        assert world.fleet.choose("tiny") is first


async def test_a_look_at_a_hung_engine_holds_up_no_other() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    hung, other = world.engines

    async def hang() -> None:
        await asyncio.Event().wait()

    hung.find_fault = hang  # type: ignore[assignment, method-assign]
    following = asyncio.create_task(world.fleet.follow(0.001))
    async with asyncio.timeout(5):
        while not world.fleet.is_ready():
            await asyncio.sleep(0)
        other.restart()
        boots = str(other.boots)
        while world.fleet.members["engine-1"].boot_id != boots:
            await asyncio.sleep(0.001)
    following.cancel()
    await world.fleet.close()


async def test_an_adapter_that_loads_while_its_engine_is_met_again_stays_in_the_mirror() -> None:
    world = World()
    await world.fleet.reconcile()
    engine = world.engines[0]
    engine.loading = asyncio.Event()
    preparing = asyncio.create_task(world.fleet.prepare(Weights(1)))
    async with asyncio.timeout(5):
        await engine.asked_to_load.wait()
        engine.boots += 1
        reconciling = asyncio.create_task(world.fleet.reconcile())
        while world.member.status is EngineStatus.READY:
            await asyncio.sleep(0)
        for _ in range(10):  # as far as it comes
            await asyncio.sleep(0)
        engine.loading.set()
        await preparing
        await reconciling
    assert set(world.member.loaded) == set(engine.slots.served) == {Weights(1).engine_name}


async def test_a_load_that_fails_takes_the_engine_from_nobody() -> None:
    world = World()
    await world.fleet.reconcile()
    await world.promote(1)

    async def break_off(_name: str, _path: str) -> None:
        raise EngineUnreachable("reset")

    world.engines[0].load = break_off  # type: ignore[method-assign]
    with pytest.raises(NotReady, match="no engine could load 'assistant@2'"):
        await world.fleet.prepare(Weights(2))
    assert world.fleet.serves(Weights(1))
    await looked_at(world.member)
    assert world.fleet.serves(Weights(1))


async def test_an_engine_with_fewer_slots_than_the_settings_say_is_given_no_more() -> None:
    world = World()
    world.engines[0].max_loras = 2
    await world.fleet.reconcile()
    await world.promote(1)
    for number in range(2, 6):
        await world.fleet.prepare(Weights(number))
        assert len(world.member.loaded) == 2
        assert world.fleet.serves(Weights(1))
    with pytest.raises(NotReady, match="need 1 of 2 and one is for evaluations"):
        await world.fleet.pin(Weights(9), world.fleet.holding())
    world.engines[0].max_loras = 9
    assert world.fleet.slots(world.member) == CAPACITY  # never more than was set


async def test_a_503_says_the_state_of_a_few_engines_in_few_words() -> None:
    world = World(engines=[SlotsEngine(f"engine-{n}") for n in range(40)])
    for engine in world.engines:
        engine.healthy = False
        engine.fault = "x" * 5000
    await world.fleet.reconcile()
    with pytest.raises(NotReady, match=r"engine-0 is loading: x+…; .*; 37 more\)") as refused:
        world.fleet.choose("tiny")
    assert len(refused.value.message) < 1000


async def test_one_engine_s_trouble_is_not_the_other_s() -> None:
    world = World(engines=[SlotsEngine("engine-0"), SlotsEngine("engine-1")])
    world.engines[0].list_models = _broken  # type: ignore[method-assign]
    await world.fleet.reconcile()
    assert world.fleet.choose("tiny").id == "engine-1"
    assert "KeyError" in world.member.reason


async def _broken() -> dict[str, str]:
    raise KeyError("data")


async def test_a_release_without_reference_figures_is_unfit_and_breaks_nothing_else() -> None:
    world = World()
    await world.fleet.reconcile()
    with pytest.raises(Unfit) as refused:
        await world.fleet.prepare(Weights(404))
    assert refused.value.code == "adapter_missing"
    await world.fleet.prepare(Weights(1))
    assert world.fleet.serves(Weights(1))


class Slotting(RuleBasedStateMachine):
    """Promise 9: never more adapters than slots, and what has a role is never evicted."""

    numbers = st.integers(1, 9)

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.world = World()
        self.running: list[tuple[Any, str]] = []
        self.holds: list[tuple[Hold, int]] = []
        self.leases = 0
        self.do(self.world.fleet.reconcile())

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
        self.world.roles = self.world.roles[1::-1]
        assert self.world.fleet.serves(self.world.roles[0])
        assert self.world.engines[0].slots.loads == loads

    @rule(number=numbers, stays=st.booleans())
    def pin(self, number: int, stays: bool) -> None:
        hold = self.world.fleet.holding()
        try:
            self.do(self.world.fleet.pin(Weights(number), hold))
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
        self.leases += 1
        token = str(self.leases)
        try:
            self.do(self.world.fleet.hold_evaluation_slot(Weights(number), token, 10))
        except NotReady as refused:
            # Requests that run on what had a role may need it; pins alone never do.
            if refused.code == "no_adapter_slot":
                assert len(self.needed()) > CAPACITY - 1

    @rule(number=numbers)
    def begin(self, number: int) -> None:
        fleet, name = self.world.fleet, Weights(number).engine_name
        if fleet.serves(Weights(number)) and len(self.running) < 2:
            slots = self.world.engines[0].slots
            context = fleet.run(fleet.choose(name), name)
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
        self.do(self.world.fleet.reconcile())

    @invariant()
    def no_more_than_slots_and_the_mirror_is_true(self) -> None:
        slots, loaded = self.world.engines[0].slots, self.world.member.loaded
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


async def test_an_engine_is_asked_once_whether_it_calls_tools_however_many_want_to_know() -> None:
    world = World()
    await world.fleet.reconcile()
    asked, answers = 0, asyncio.Event()

    async def answer(_model: str) -> bool:
        nonlocal asked
        asked += 1
        await answers.wait()
        if asked == 1:
            raise EngineRefused(502, "Bad Gateway")
        return True

    world.engines[0].parses_tools = answer  # type: ignore[attr-defined] - this engine alone
    waiting = [asyncio.ensure_future(world.fleet.parses_tools()) for _ in range(3)]
    await asyncio.sleep(0)
    answers.set()
    assert await asyncio.gather(*waiting) == [None] * 3
    assert (await world.fleet.parses_tools(), asked) == (None, 1)
    world.engines[0].restart()
    await world.fleet.reconcile()
    assert (await world.fleet.parses_tools(), asked) == (True, 2)


async def test_what_everybody_may_read_of_an_engine_names_no_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = "[Errno 2] '/srv/models/secret/adapter.bin' on gpu-7.internal via http://10.0.0.7:8001/"
    world = World()

    async def list_models() -> dict[str, str]:
        raise EngineRefused(500, words)

    world.engines[0].list_models = list_models  # type: ignore[method-assign] - this one alone
    await world.fleet.reconcile()
    assert world.member.reason == "engine answered 500: [Errno 2] '…' on … via …"
    assert any(words in str(vars(record).get("reason")) for record in caplog.records)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("<html><head><title>502 Bad Gateway</title></head>", "a page of HTML (502 Bad Gateway)"),
        (
            "/metrics has no start; /v1/models answered",
            "/metrics has no start; /v1/models answered",
        ),
        ("x" * 5000, "x" * 200 + "…"),
    ],
)
async def test_reasons_are_short(words: str, told: str) -> None:
    assert in_public(words) == told
