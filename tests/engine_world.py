"""Engines without servers, with a conductor and a chooser over them, for tests of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from server.engines.base import EngineAddress, EngineRefused, EngineUnreachable
from server.engines.chooser import Chooser, Replica
from server.engines.conductor import Conductor, Member
from server.engines.picture import EngineView, Picture, Roles
from server.engines.pins import Pins
from server.engines.proof import Proof
from server.engines.tool_calls import ToolCalls
from tests.fake_engine.weights import BASE, Slots, fake_logprobs

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


class World:
    """A conductor, and a chooser that goes by its pictures; tests move roles and the clock."""

    def __init__(
        self, engines: Sequence[SlotsEngine] | None = None, roles: Sequence[Weights] | None = None
    ) -> None:
        self.engines = [SlotsEngine()] if engines is None else list(engines)
        self.time = 0.0
        unknown = Picture("tiny", CAPACITY)
        self.chooser = Chooser(
            unknown,
            connect=self._connect,
            look_at=lambda engine_id: self.conductor.look_at(engine_id),
            monotonic=self.clock,
        )
        self.conductor = Conductor(
            unknown,
            addresses=lambda: [engine.address for engine in self.engines],
            connect=self._connect,
            reference=self.reference,
            path=lambda content_hash: content_hash,
            traffic=self.chooser,
            publish=self.chooser.show,
            monotonic=self.clock,
        )
        self.pins = Pins(self.chooser, self.conductor.prepare, self.clock)
        self.tool_calls = ToolCalls(self.chooser, self.clock)
        self.roles: list[Weights] = []
        self.assign([Weights(0)] if roles is None else list(roles))

    def clock(self) -> float:
        """Seconds that tests move on; no two looks at a clock are the same moment."""
        self.time += 1e-6
        return self.time

    def _connect(self, address: EngineAddress) -> Any:
        return next(engine for engine in self.engines if engine.address == address)

    def assign(self, roles: list[Weights]) -> None:
        """Production first."""
        self.roles = roles
        self.conductor.assign(Roles(required=tuple(roles[:1]), wanted=tuple(roles)))

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
    def picture(self) -> Picture:
        return self.chooser.picture

    @property
    def view(self) -> EngineView:
        """The first engine, in the picture."""
        return self.picture.engines["engine-0"]

    @property
    def adapters(self) -> Mapping[str, Proof | None]:
        """What the first engine holds, in the picture."""
        return self.view.adapters

    @property
    def replica(self) -> Replica:
        """The first engine, as requests meet it."""
        return self.chooser.replicas["engine-0"]

    @property
    def member(self) -> Member:
        """The first engine, as the conductor has it."""
        return self.conductor.members["engine-0"]

    async def promote(self, number: int) -> None:
        release = Weights(number)
        with self.conductor.keep(release):
            await self.conductor.prepare(release)
            self.assign([release, self.roles[0]])
        await self.conductor.trim()

    async def canary(self, number: int) -> None:
        release = Weights(number)
        with self.conductor.keep(release):
            await self.conductor.prepare(release)
            self.assign([*(self.roles * 2)[:2], release])
        await self.conductor.trim()

    async def close(self) -> None:
        await self.chooser.close()
        await self.conductor.close()


async def looked_at(engine: Replica | Member) -> None:
    """Return when the look that a failure there began has ended."""
    assert engine.look is not None
    async with asyncio.timeout(5):
        await engine.look
