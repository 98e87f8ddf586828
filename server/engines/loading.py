"""How an adapter gets onto an engine, is proven there and goes again.

Owns: the mirror of what one engine holds (`Mirror`), which adapter goes where a slot is needed, and
that what has to stay is used once more before anything new comes in: the engine itself evicts what
it used least recently. Does not own: whether an engine is well (`conductor.py`), or what a probe's
figures mean (`proof.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from feedback.errors import Conflict, NotReady
from server.engines.base import Engine, EngineError, EngineRefused
from server.engines.needs import Needs
from server.engines.picture import Traffic, Weights, is_fit
from server.engines.proof import Outcome, Proof, judge

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Unfit(Conflict):
    """An engine showed that a release must not answer; `proof` has the figures."""

    def __init__(self, message: str, *, code: str, proof: Proof | None = None) -> None:
        super().__init__(message, code=code)
        self.proof = proof


@dataclass(slots=True)
class Loaded:
    """An adapter on an engine."""

    proof: Proof | None = None  #: None until there is one
    used_at: float = 0.0  #: by the conductor, of its clock


@dataclass(slots=True)
class Mirror:
    """One engine and the adapters that it holds."""

    engine: Engine
    loaded: dict[str, Loaded] = field(default_factory=dict)
    """By engine name; what the conductor used last comes last."""
    unloaded: dict[str, float] = field(default_factory=dict)
    """Names that are unloaded and may still take room in its memory, and when each was used."""
    base_figures: dict[str, list[list[float]]] = field(default_factory=dict)  #: by adapter id
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  #: of `loaded`, and what changes it

    @property
    def id(self) -> str:
        return self.engine.address.id

    def forget(self, names: Sequence[str]) -> None:
        """Reset to `names`, all unproven: the engine is another process."""
        self.base_figures.clear()
        self.loaded = {name: Loaded() for name in names}
        self.unloaded.clear()

    def compare(self, names: Sequence[str]) -> None:
        """Make the names those of the engine, whose process is the same: proofs stay."""
        for forgotten in self.loaded.keys() - set(names):
            del self.loaded[forgotten]
        for name in names:  # of another conductor, or of a load that broke off
            self.loaded.setdefault(name, Loaded())


class Loader:
    """Loads, proves and unloads, on one engine at a time.

    `capacity` is how many adapters an engine may hold. `reference(adapter_id)` gives the trainer's
    probe figures, `path(content_hash)` the adapter's verified directory as engines see it; both
    raise OSError where there is none. `changed(engine_id)` is called whenever a mirror has changed,
    before anything else happens.
    """

    def __init__(
        self,
        *,
        base_name: str,
        capacity: int,
        traits: Mapping[str, Any],
        reference: Callable[[str], Mapping[str, Any]],
        path: Callable[[str], str],
        needs: Needs,
        traffic: Traffic,
        changed: Callable[[str], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_name = base_name
        self.capacity = capacity
        self.traits = dict(traits)
        self._reference = reference
        self._path = path
        self._needs = needs
        self._traffic = traffic
        self._changed = changed
        self._monotonic = monotonic

    def slots(self, mirror: Mirror) -> int:
        """How many adapters the engine may hold: what the settings say, or fewer that it has."""
        return min(self.capacity, mirror.engine.max_loras or self.capacity)

    def has(self, mirror: Mirror, release: Weights) -> bool:
        """Whether the engine may answer with `release`, as far as its adapters go."""
        if release.adapter_id is None:
            return True
        loaded = mirror.loaded.get(release.engine_name)
        return (
            loaded is not None
            and loaded.proof is not None
            and is_fit(release, loaded.proof, self.traits)
        )

    async def ensure(
        self, mirror: Mirror, release: Weights, *, tolerate_noise: bool = False
    ) -> Proof | None:
        """Load and prove `release`, unless it is there. None for the base itself.

        Raises Unfit where the engine does not answer with it, NotReady where no slot is free.
        """
        if release.adapter_id is None or release.adapter_hash is None:
            return None
        name = release.engine_name
        async with mirror.lock:
            if name not in mirror.loaded:
                await self._load(mirror, release, release.adapter_hash)
            proof = mirror.loaded[name].proof or await self._prove(
                mirror, release, release.adapter_id
            )
            if is_fit(release, proof, self.traits, tolerate_noise=tolerate_noise):
                return proof
            # Under evaluation the engine keeps what others may not be answered with.
            if proof.outcome is not Outcome.UNPROVEN or name not in self._needs.under_evaluation():
                await self._unload(mirror, name)
            raise Unfit(f"{release.name}: {proof.message()}", code=proof.outcome.value, proof=proof)

    async def trim(self, mirror: Mirror) -> None:
        """Unload what nothing needs: no role, no evaluation, no request."""
        async with mirror.lock:
            # Looked at anew after each: a request may have taken hold of one meanwhile.
            while evictable := self._list_evictable(mirror):
                await self._unload(mirror, evictable[0])

    async def list_adapters(self, mirror: Mirror) -> list[str]:
        """Names of the adapters on an engine. Raises EngineRefused where it has another base."""
        names = await mirror.engine.list_models()
        if self.base_name not in names:
            raise EngineRefused(
                404,
                f"it serves {', '.join(sorted(names)) or 'nothing'}, "
                f"the base {self.base_name!r} was expected",
            )
        return [name for name in names if name != self.base_name]

    async def _load(self, mirror: Mirror, release: Weights, content_hash: str) -> None:
        name, engine, slots = release.engine_name, mirror.engine, self.slots(mirror)
        while len(mirror.loaded) >= slots:
            evictable = self._list_evictable(mirror)
            if not evictable:
                raise NotReady(
                    f"engine {mirror.id} holds {len(mirror.loaded)} adapters and all are needed; "
                    f"release {release.name!r} finds no slot (it has {slots}, and "
                    f"engine.max_loras is {self.capacity})",
                    code="no_adapter_slot",
                )
            await self._unload(mirror, evictable[0])
        path = await _read(self._path, content_hash, release)
        await self._touch_what_stays(mirror)
        await self._make_room(mirror, slots)
        try:
            await engine.load(name, path)
        except EngineRefused as error:
            if (await engine.list_models()).get(name) != path:
                raise Unfit(
                    f"engine {mirror.id} refused the adapter of {release.name!r}: {error.message}",
                    code="load_refused",
                ) from None
            # Another gateway has loaded it there; what it is, the proof tells.
        mirror.loaded[name] = Loaded(used_at=self._monotonic())
        self._changed(mirror.id)
        logger.info(
            "Adapter loaded",
            extra={"action": "adapter_loaded", "engine": mirror.id, "release": release.name},
        )

    async def _touch_what_stays(self, mirror: Mirror) -> None:
        """Use each protected adapter once more: then the engine evicts another one.

        Its order of use still has names that were unloaded.
        """
        protected = self._list_protected()
        for name in [name for name in mirror.loaded if name in protected]:
            try:
                await mirror.engine.touch(name)
            except EngineRefused as error:
                if error.status != 404:
                    raise
                mirror.loaded.pop(name, None)  # the engine has forgotten it; it will be restored
                self._changed(mirror.id)
            if name in mirror.loaded:
                self._use(mirror, name, mirror.loaded[name].proof)

    async def _prove(self, mirror: Mirror, release: Weights, adapter_id: str) -> Proof:
        name = release.engine_name
        reference = await _read(self._reference, adapter_id, release)
        prompts = reference["prompts"]
        base = mirror.base_figures.get(adapter_id)
        try:
            if base is None:
                base = await mirror.engine.prompt_logprobs(self.base_name, prompts)
                mirror.base_figures[adapter_id] = base
            figures = await mirror.engine.prompt_logprobs(name, prompts)
        except EngineRefused as error:
            await self._unload(mirror, name)
            raise Unfit(
                f"engine {mirror.id} did not answer the probe of {release.name!r}: {error.message}",
                code="probe_refused",
            ) from None
        proof = judge(reference, base, figures)
        self._use(mirror, name, proof)
        self._changed(mirror.id)
        logger.info(
            "Adapter probed",
            extra={
                "action": "adapter_probed",
                "engine": mirror.id,
                "release": release.name,
                **proof.as_details(),
            },
        )
        return proof

    async def _make_room(self, mirror: Mirror, slots: int) -> None:
        """Unload what the engine is about to drop from its memory for the next load.

        It drops what was used least recently, and what was unloaded counts until it has aged out.
        A name that stayed would be read again on its next request, and drop what must stay.
        """
        while mirror.unloaded and len(mirror.loaded) + len(mirror.unloaded) >= slots:
            oldest = min(mirror.unloaded, key=lambda name: mirror.unloaded[name])
            evictable = self._list_evictable(mirror)
            if evictable and self._used_at(mirror, evictable[0]) < mirror.unloaded[oldest]:
                await self._unload(mirror, evictable[0])
                oldest = evictable[0]
            mirror.unloaded.pop(oldest, None)

    def _use(self, mirror: Mirror, name: str, proof: Proof | None) -> None:
        """The engine used it just now: it comes last, also where the clock has not moved."""
        mirror.loaded.pop(name, None)
        mirror.loaded[name] = Loaded(proof, self._monotonic())

    async def _unload(self, mirror: Mirror, name: str) -> None:
        # Out of the mirror first: nothing is routed to what is on its way out.
        if name in mirror.loaded:
            mirror.unloaded[name] = self._used_at(mirror, name)
            del mirror.loaded[name]
            self._changed(mirror.id)
        try:
            await mirror.engine.unload(name)
        except EngineError as error:
            # An unknown name is what was wanted; after any other answer it may still be there.
            if not (isinstance(error, EngineRefused) and error.status == 404):
                mirror.loaded[name] = Loaded()
                mirror.unloaded.pop(name, None)
                self._changed(mirror.id)
                raise
        logger.info(
            "Adapter unloaded",
            extra={"action": "adapter_unloaded", "engine": mirror.id, "adapter": name},
        )

    def _list_protected(self) -> set[str]:
        return self._needs.all() | self._traffic.held()

    def _list_evictable(self, mirror: Mirror) -> list[str]:
        """Adapters that may go, least recently used first."""
        protected, traffic = self._list_protected(), self._traffic
        names = [
            name
            for name in mirror.loaded
            if name not in protected and not traffic.is_running(mirror.id, name)
        ]
        return sorted(names, key=lambda name: self._used_at(mirror, name))

    def _used_at(self, mirror: Mirror, name: str) -> float:
        used_at = mirror.loaded[name].used_at
        return max(used_at, self._traffic.last_used(mirror.id, name))


async def _read(source: Callable[[str], T], key: str, release: Weights) -> T:
    """Something about `release` from disk or database; Unfit where it is not there."""
    try:
        return await asyncio.to_thread(source, key)
    except OSError as error:
        # Without the path that the system's own errors name: callers read it.
        why = error.strerror or error
        raise Unfit(f"{release.name}: {why}", code="adapter_missing") from None
