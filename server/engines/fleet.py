"""The engines of one gateway: what is loaded where, proven there, and running there.

Owns: the mirror of each engine's adapters in the engine's own order of use, slots, proofs, counts
of running requests, the reconciler that restores an engine that forgot. Covered: an engine that
restarts, a gateway that restarts beside a running engine, a load that answers 200 and does nothing,
a request that fails on an engine that is well: it takes the engine from nobody, for an engine is
judged by its health and boot id alone. Does not own: the moves of releases
(`server/deployments/promotion.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from feedback.errors import Conflict, NotReady
from server.engines.base import (
    Engine,
    EngineAddress,
    EngineError,
    EngineRefused,
    EngineUnreachable,
)
from server.engines.proof import Outcome, Proof, judge
from server.engines.reasons import in_public

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOOLS_SECONDS = 5.0  #: longest wait for an engine to say whether it calls tools
RETRY_SECONDS = 15.0
"""Pause before a release that an engine could not restore is tried there again, and before it is
asked again what it did not tell.
"""

MOST_REFUSED = 256  #: releases that are remembered as unfit for pins

MOST_EXPLAINED = 3  #: engines whose state a 503 tells; `readyz` lists them all

LOOK_PAUSE_SECONDS = 0.1
"""Pause between two looks at an engine on which requests keep failing."""


class EngineStatus(StrEnum):
    LOADING = "loading"  #: not reached yet, or restoring its adapters
    READY = "ready"  #: answers, with every release of a role proven
    FAILED = "failed"  #: answered before and does not now, or cannot hold a release


class Weights(Protocol):
    """What the fleet needs to know of a release; `routing.ReleaseView` is one."""

    @property
    def name(self) -> str: ...
    @property
    def engine_name(self) -> str: ...
    @property
    def adapter_id(self) -> str | None: ...
    @property
    def adapter_hash(self) -> str | None: ...
    @property
    def acceptance(self) -> Mapping[str, Any] | None: ...


class Unfit(Conflict):
    """An engine showed that a release must not answer; `proof` has the figures."""

    def __init__(self, message: str, *, code: str, proof: Proof | None = None) -> None:
        super().__init__(message, code=code)
        self.proof = proof


@dataclass(slots=True)
class Member:
    """One engine and what the gateway knows of it."""

    engine: Engine
    status: EngineStatus = EngineStatus.LOADING
    reason: str = "not reached yet"  #: for everybody to read: `in_public`
    boot_id: str | None = None
    parses_tools: bool | None = None  #: None: not known yet
    tools_asked: asyncio.Task[None] | None = None  #: the question, which all who wait share
    tools_retry_at: float = 0.0  #: when it may be asked again, where it had no answer
    loaded: OrderedDict[str, Proof | None] = field(default_factory=OrderedDict)
    """Adapters by engine name, least recently used first; the proof is None until there is one."""
    running: dict[str, int] = field(default_factory=dict)
    base_figures: dict[str, list[list[float]]] = field(default_factory=dict)
    retry_at: dict[str, float] = field(
        default_factory=dict
    )  #: releases that failed to restore, by name
    problems: dict[str, str] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  #: of `loaded`, and what changes it
    attention: asyncio.Lock = field(default_factory=asyncio.Lock)  #: one look at a time
    suspicions: int = 0  #: requests that failed here since the last look at the engine began
    may_have_forgotten: bool = False  #: the mirror's names are to be compared with the engine's
    look: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.engine.address.id

    def is_ready_for(self, engine_name: str, base_name: str) -> bool:
        return self.status is EngineStatus.READY and (
            engine_name == base_name or self.loaded.get(engine_name) is not None
        )


class Run:
    """One request that runs on an engine, for the time of a `with` block."""

    __slots__ = ("_member", "_name")

    def __init__(self, member: Member, engine_name: str) -> None:
        self._member = member
        self._name = engine_name

    def __enter__(self) -> None:
        running, name = self._member.running, self._name
        running[name] = running.get(name, 0) + 1
        if name in self._member.loaded:
            self._member.loaded.move_to_end(name)

    def __exit__(self, *_: object) -> None:
        running, name = self._member.running, self._name
        running[name] -= 1
        if not running[name]:
            del running[name]


class Hold:
    """The adapter that one request keeps loaded, from its routing to its end.

    Does nothing until it takes a release. What it keeps may lose its role meanwhile, and stays.
    """

    __slots__ = ("_held", "_name")

    def __init__(self, held: dict[str, int]) -> None:
        self._held = held
        self._name: str | None = None

    def take(self, release: Weights) -> None:
        """Keep `release`, and no longer what was kept before."""
        self.end()
        if release.adapter_id is not None:
            self._name = release.engine_name
            self._held[self._name] = self._held.get(self._name, 0) + 1

    def end(self) -> None:
        name, self._name = self._name, None
        if name is not None:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]


@dataclass(frozen=True, slots=True)
class Lease:
    """The evaluation slot, held by a worker for one release."""

    token: str
    release: Weights
    expires_at: float  #: of the fleet's monotonic clock


class Fleet:
    """All engines. One event loop owns it; nothing here blocks on the database.

    `capacity` is how many adapters an engine may hold. `reference(adapter_id)` gives the trainer's
    probe figures, `path(content_hash)` the adapter's verified directory as engines see it; both
    raise OSError where there is none. `required()` are the releases in production, without which an
    engine gets no traffic; `wanted()` those of all roles. `traits` is what the engines' noise
    depends on: a person's acceptance of an unproven release holds where it names the same.
    `find_difference(engine)` says why an engine that was just met may not answer at all.
    """

    def __init__(
        self,
        *,
        base_name: str,
        capacity: int,
        addresses: Callable[[], Iterable[EngineAddress]],
        connect: Callable[[EngineAddress], Engine],
        reference: Callable[[str], Mapping[str, Any]],
        path: Callable[[str], str],
        required: Callable[[], Iterable[Weights]],
        wanted: Callable[[], Iterable[Weights]],
        traits: Mapping[str, Any] | None = None,
        find_difference: Callable[[Engine], Awaitable[str | None]] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_name = base_name
        self.capacity = capacity
        self.members: dict[str, Member] = {}
        self.integrity_errors = 0
        self._addresses = addresses
        self._connect = connect
        self._reference = reference
        self._path = path
        self._required = required
        self._wanted = wanted
        self._find_difference = find_difference
        self._monotonic = monotonic
        self.traits = dict(traits or {})
        self._leases: dict[str, Lease] = {}
        self._moving: dict[str, int] = {}  #: releases on their way to a role, how often
        self._held: dict[str, int] = {}  #: what requests keep, how many of them
        self._refused: dict[str, tuple[float, Unfit]] = {}  #: pins that failed, until when

    # Requests

    def choose(self, engine_name: str) -> Member:
        """The least busy engine that has `engine_name` proven. Raises NotReady."""
        member = self._least_busy(engine_name, None)
        if member is None:
            raise NotReady(self.explain_not_ready(), code="engine_not_ready")
        return member

    def check_ready(self) -> None:
        """Raises NotReady where no engine takes requests."""
        if not self.is_ready():
            raise NotReady(self.explain_not_ready(), code="engine_not_ready")

    def find_another(self, engine_name: str, than: Member) -> Member | None:
        """An engine beside `than` that has `engine_name` proven."""
        return self._least_busy(engine_name, than)

    def _least_busy(self, engine_name: str, avoid: Member | None) -> Member | None:
        ready = (
            m
            for m in self.members.values()
            if m is not avoid and m.is_ready_for(engine_name, self.base_name)
        )
        # One on which a request has just failed comes last until it was looked at: what fails at
        # once is never busy.
        return min(ready, key=lambda m: (m.suspicions > 0, sum(m.running.values())), default=None)

    def run(self, member: Member, engine_name: str) -> Run:
        """Count one request on `member`; counted down exactly once, whatever ends the block."""
        return Run(member, engine_name)

    def explain_not_ready(self) -> str:
        """One sentence for `readyz` and for callers."""
        if not self.members:
            return "no engine is there yet; it is starting or none is configured"
        states = [
            f"{member.id} is {member.status}: {member.reason}"
            for member in islice(self.members.values(), MOST_EXPLAINED)
        ]
        if len(self.members) > MOST_EXPLAINED:
            states.append(f"{len(self.members) - MOST_EXPLAINED} more")
        return f"no engine is ready ({'; '.join(states)})"

    def is_ready(self) -> bool:
        return any(m.status is EngineStatus.READY for m in self.members.values())

    def served_names(self) -> set[str]:
        """Engine names that some engine holds."""
        return {name for member in self.members.values() for name in member.loaded}

    # Adapters

    async def parses_tools(self) -> bool | None:
        """Whether every engine that is ready calls tools; None where one of them doesn't tell."""
        ready = [m for m in self.members.values() if m.status is EngineStatus.READY]
        found = await asyncio.gather(*map(self._parses_tools, ready))
        return False if False in found else None if None in found or not found else True

    async def _parses_tools(self, member: Member) -> bool | None:
        if member.parses_tools is None and member.tools_retry_at <= self._monotonic():
            if member.tools_asked is None or member.tools_asked.done():
                member.tools_asked = asyncio.create_task(self._ask_for_tools(member))
            await asyncio.wait([member.tools_asked])
        return member.parses_tools

    async def _ask_for_tools(self, member: Member) -> None:
        boot_id = member.boot_id
        found = None
        try:
            async with asyncio.timeout(TOOLS_SECONDS):
                found = await member.engine.parses_tools(self.base_name)
        except (EngineError, TimeoutError) as error:
            logger.info(
                "Engine does not tell whether it calls tools",
                extra={
                    "action": "tools_unknown",
                    "engine": member.id,
                    "reason": str(error) or type(error).__name__,
                },
            )
        if member.boot_id == boot_id:
            member.parses_tools = found
            member.tools_retry_at = self._monotonic() + RETRY_SECONDS

    async def prepare(self, release: Weights, *, tolerate_noise: bool = False) -> dict[str, Proof]:
        """Load `release` on every ready engine and prove it there; proofs by engine id.

        `tolerate_noise` lets a release answer whose effect the engine's noise hides: for its
        evaluation only. Raises NotReady where no engine is ready or none has a slot, Unfit where an
        engine does not answer with these weights (it is unloaded there again). Until something
        needs the release, the next move may unload it: see `keep` and `pin`.
        """
        ready = [m for m in self.members.values() if m.status is EngineStatus.READY]
        if not ready:
            raise NotReady(self.explain_not_ready(), code="engine_not_ready")
        proofs: dict[str, Proof] = {}
        for member in ready:
            try:
                proof = await self._ensure(member, release, tolerate_noise=tolerate_noise)
            except EngineError as error:
                self.suspect(member, str(error))
                continue
            if proof is not None:
                proofs[member.id] = proof
        if release.adapter_id is not None and not proofs:
            raise NotReady(
                f"no engine could load {release.name!r} just now; try again",
                code="engine_not_ready",
            )
        return proofs

    @contextmanager
    def keep(self, release: Weights) -> Iterator[None]:
        """Nothing unloads `release` during the block: it is on its way to a role."""
        name = release.engine_name
        self._moving[name] = self._moving.get(name, 0) + 1
        try:
            yield
        finally:
            self._moving[name] -= 1
            if not self._moving[name]:
                del self._moving[name]

    def holding(self) -> Hold:
        """A hold for one request, which keeps nothing yet."""
        return Hold(self._held)

    async def pin(self, release: Weights, hold: Hold, *, tolerate_noise: bool = False) -> None:
        """Have `release` loaded and proven for a request that names it, until `hold` ends.

        Pins use the slots that roles and evaluation leave. Raises NotReady `no_adapter_slot` where
        none is left, and what `prepare` raises; Unfit at once where it was raised a moment ago.
        """
        self._check_room_for_pin(release)
        hold.take(release)
        if self.serves(release, tolerate_noise=tolerate_noise):
            return
        until, known = self._refused.get(release.engine_name, (0.0, None))
        if known is not None and self._monotonic() < until:
            raise Unfit(known.message, code=str(known.code), proof=known.proof)
        try:
            await self.prepare(release, tolerate_noise=tolerate_noise)
        except Unfit as error:
            self._remember_refusal(release.engine_name, error)
            raise

    def _check_room_for_pin(self, release: Weights) -> None:
        """The evaluation slot is no pin's, and no pin takes the place of what has a role."""
        claimed = self._claimed()
        if release.adapter_id is None or release.engine_name in claimed | self._leased():
            return
        in_use = (claimed | self._held.keys() | {release.engine_name}) - {self.base_name}
        slots = self.smallest_slots()
        if len(in_use) > slots - 1:
            raise NotReady(
                f"release {release.name!r} finds no slot: roles and running requests need "
                f"{len(in_use) - 1} of {slots} and one is for evaluations; try again, "
                "or raise engine.max_loras",
                code="no_adapter_slot",
            )

    def _remember_refusal(self, engine_name: str, error: Unfit) -> None:
        self._refused.pop(engine_name, None)
        self._refused[engine_name] = (self._monotonic() + RETRY_SECONDS, error)
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def slots(self, member: Member) -> int:
        """How many adapters `member` may hold: what the settings say, or fewer that it has."""
        return min(self.capacity, member.engine.max_loras or self.capacity)

    def smallest_slots(self) -> int:
        """How many adapters every engine can hold, for they hold the same."""
        return min((self.slots(member) for member in self.members.values()), default=self.capacity)

    def serves(self, release: Weights, *, tolerate_noise: bool = False) -> bool:
        """True when some engine may answer with `release` now."""
        return any(
            m.status is EngineStatus.READY and self._has(m, release, tolerate_noise)
            for m in self.members.values()
        )

    async def trim(self) -> None:
        """Unload what nothing needs: no role, no lease, no running request."""
        for member in list(self.members.values()):
            async with member.lock:
                try:
                    # Looked at anew after each: a request may have taken hold of one meanwhile.
                    while evictable := self._evictable(member):
                        await self._unload(member, evictable[0])
                except EngineError as error:
                    self.suspect(member, str(error))

    async def _ensure(
        self, member: Member, release: Weights, *, tolerate_noise: bool = False
    ) -> Proof | None:
        """Load and prove `release` on one engine, unless it is there. None for the base itself."""
        if release.adapter_id is None or release.adapter_hash is None:
            return None
        async with member.lock:
            if release.engine_name not in member.loaded:
                await self._load(member, release)
            proof = member.loaded[release.engine_name] or await self._prove(member, release)
            if self._is_fit(release, proof, tolerate_noise):
                return proof
            # Under evaluation the engine keeps what others may not be answered with.
            if proof.outcome is not Outcome.UNPROVEN or release.engine_name not in self._leased():
                await self._unload(member, release.engine_name)
            raise Unfit(f"{release.name}: {proof.message()}", code=proof.outcome.value, proof=proof)

    def _is_fit(self, release: Weights, proof: Proof, tolerate_noise: bool) -> bool:
        if proof.outcome is Outcome.UNPROVEN:
            return tolerate_noise or self._is_accepted(release)
        return proof.outcome is Outcome.PROVEN

    def _is_accepted(self, release: Weights) -> bool:
        accepted = release.acceptance
        return accepted is not None and all(accepted.get(k) == v for k, v in self.traits.items())

    async def _load(self, member: Member, release: Weights) -> None:
        name = release.engine_name
        slots = self.slots(member)
        while len(member.loaded) >= slots:
            evictable = self._evictable(member)
            if not evictable:
                raise NotReady(
                    f"engine {member.id} holds {len(member.loaded)} adapters and all are needed; "
                    f"release {release.name!r} finds no slot (it has {slots}, and "
                    f"engine.max_loras is {self.capacity})",
                    code="no_adapter_slot",
                )
            await self._unload(member, evictable[0])
        # The engine itself evicts what it used least recently, names that were unloaded included.
        # What must stay is therefore used once more before anything new comes in.
        assert release.adapter_hash is not None
        path = await _read(self._path, release.adapter_hash, release)
        protected = self._protected()
        for kept in [kept for kept in member.loaded if kept in protected]:
            try:
                await member.engine.touch(kept)
            except EngineRefused as error:
                if error.status != 404:
                    raise
                member.loaded.pop(kept, None)  # the engine has forgotten it; it will be restored
            if kept in member.loaded:
                member.loaded.move_to_end(kept)
        try:
            await member.engine.load(name, path)
        except EngineRefused as error:
            if (await member.engine.list_models()).get(name) != path:
                raise Unfit(
                    f"engine {member.id} refused the adapter of {release.name!r}: {error.message}",
                    code="load_refused",
                ) from None
            # Another gateway has loaded it there; what it is, the proof tells.
        member.loaded[name] = None
        logger.info(
            "Adapter loaded",
            extra={"action": "adapter_loaded", "engine": member.id, "release": release.name},
        )

    async def _prove(self, member: Member, release: Weights) -> Proof:
        assert release.adapter_id is not None
        reference = await _read(self._reference, release.adapter_id, release)
        prompts = reference["prompts"]
        base = member.base_figures.get(release.adapter_id)
        try:
            if base is None:
                base = await member.engine.prompt_logprobs(self.base_name, prompts)
                member.base_figures[release.adapter_id] = base
            figures = await member.engine.prompt_logprobs(release.engine_name, prompts)
        except EngineRefused as error:
            await self._unload(member, release.engine_name)
            raise Unfit(
                f"engine {member.id} did not answer the probe of {release.name!r}: {error.message}",
                code="probe_refused",
            ) from None
        proof = judge(reference, base, figures)
        member.loaded[release.engine_name] = proof
        member.loaded.move_to_end(release.engine_name)
        logger.info(
            "Adapter probed",
            extra={
                "action": "adapter_probed",
                "engine": member.id,
                "release": release.name,
                **proof.as_details(),
            },
        )
        return proof

    async def _unload(self, member: Member, name: str) -> None:
        # Out of the mirror first: nothing is routed to what is on its way out.
        member.loaded.pop(name, None)
        try:
            await member.engine.unload(name)
        except EngineError as error:
            # An unknown name is what was wanted; after any other answer it may still be there.
            if not (isinstance(error, EngineRefused) and error.status == 404):
                member.loaded[name] = None
                member.loaded.move_to_end(name, last=False)
                raise
        logger.info(
            "Adapter unloaded",
            extra={"action": "adapter_unloaded", "engine": member.id, "adapter": name},
        )

    def _protected(self) -> set[str]:
        return self._claimed() | self._leased() | self._held.keys()

    def _claimed(self) -> set[str]:
        """Engine names of what has a role, or is on its way to one."""
        return {release.engine_name for release in self._wanted()} | self._moving.keys()

    def _leased(self) -> set[str]:
        """Engine names of what is under evaluation."""
        self._drop_expired_leases()
        return {lease.release.engine_name for lease in self._leases.values()}

    def _evictable(self, member: Member) -> list[str]:
        """Adapters that may go, least recently used first."""
        protected = self._protected()
        return [
            name for name in member.loaded if name not in protected and not member.running.get(name)
        ]

    # The evaluation slot

    async def hold_evaluation_slot(self, release: Weights, token: str, seconds: float) -> Lease:
        """Load and prove `release`, and keep it for `seconds` unless the lease is renewed.

        Raises NotReady when another release is under evaluation, or none can load this one, and
        Unfit when an engine does not answer with it.
        """
        self._drop_expired_leases()
        other = next(
            (x for x in self._leases.values() if x.release.engine_name != release.engine_name), None
        )
        if other is not None:
            raise NotReady(
                f"release {other.release.name!r} is under evaluation; "
                "the slot is free again when that ends",
                code="evaluation_slot_taken",
            )
        # However long the load takes, nothing else gets the slot; then the time begins.
        self._leases[token] = Lease(token, release, math.inf)
        try:
            await self.prepare(release, tolerate_noise=True)
        except BaseException:
            self._leases.pop(token, None)
            raise
        return self.renew(token, seconds)

    def renew(self, token: str, seconds: float) -> Lease:
        """Keep the slot for another `seconds`. Raises Conflict when the lease is gone."""
        lease = self._leases.get(token)
        if lease is None:
            raise Conflict(
                "this lease of the evaluation slot has ended; ask for a new one", code="lease_ended"
            )
        self._leases[token] = Lease(token, lease.release, self._monotonic() + seconds)
        return self._leases[token]

    def give_back(self, token: str) -> None:
        """End a lease; unknown ones have ended already."""
        self._leases.pop(token, None)

    def _drop_expired_leases(self) -> None:
        present = self._monotonic()
        for token in [
            token for token, lease in self._leases.items() if lease.expires_at <= present
        ]:
            del self._leases[token]

    # Following the engines

    async def follow(self, interval_seconds: float) -> None:
        """Look at every engine for ever; a slow look at one holds up none of the others."""
        while True:
            try:
                await self._find_members()
                for member in self.members.values():
                    self._look_aside(member)
            except Exception:
                logger.exception("Engines not reconciled", extra={"action": "reconcile_failed"})
            await asyncio.sleep(interval_seconds)

    async def reconcile(self) -> None:
        """Reconcile every engine once with what it must hold.

        New engines are added, gone and restarted ones noticed, and on each one the adapters that it
        must hold are restored and proven.
        """
        await self._find_members()
        await asyncio.gather(*(self._attend(member) for member in list(self.members.values())))

    def suspect(self, member: Member, reason: str) -> None:
        """A request failed on `member`: look at the engine, aside.

        The failure is the request's. The engine keeps its traffic and its proofs unless the look
        shows that it is not well, is another process, or has forgotten adapters.
        """
        if self.members.get(member.id) is not member:
            return
        if not member.suspicions:
            logger.info(
                "Engine suspected",
                extra={"action": "engine_suspected", "engine": member.id, "reason": reason},
            )
        member.suspicions += 1
        member.may_have_forgotten = True
        self._look_aside(member)

    def _look_aside(self, member: Member) -> None:
        if member.look is None or member.look.done():
            member.look = asyncio.create_task(self._look(member))

    async def _look(self, member: Member) -> None:
        await self._attend(member)
        while member.suspicions:
            await asyncio.sleep(LOOK_PAUSE_SECONDS)
            await self._attend(member)

    async def _find_members(self) -> None:
        """One member for each address that there is now."""
        addresses = {address.id: address for address in self._addresses()}
        for gone in self.members.keys() - addresses.keys():
            await _dismiss(self.members.pop(gone))
        for address in addresses.values():
            member = self.members.get(address.id)
            if member is None or member.engine.address != address:
                self.members[address.id] = Member(self._connect(address))
                if member is not None:
                    await _dismiss(member)

    async def _attend(self, member: Member) -> None:
        """Look at one engine, whose trouble is not the others'."""
        async with member.attention:
            suspicions = member.suspicions
            try:
                await self._follow_member(member)
            except EngineUnreachable as error:
                logger.info(
                    "Engine went away",
                    extra={"action": "engine_gone", "engine": member.id, "reason": str(error)},
                )
                self._fail(member, "it went away while its adapters were looked at")
            except EngineError as error:
                self._fail(member, str(error))
            except Exception as error:
                logger.exception(
                    "Engine not followed", extra={"action": "follow_failed", "engine": member.id}
                )
                self._fail(member, f"{type(error).__name__}: {error}")
            if member.suspicions == suspicions:  # none came while it was looked at
                member.suspicions = 0

    async def _follow_member(self, member: Member) -> None:
        fault = await member.engine.find_fault()
        if fault is not None:
            if member.status is EngineStatus.READY:
                self._fail(member, f"it does not answer its health check: {fault}")
            elif member.status is EngineStatus.LOADING and member.reason != in_public(fault):
                logger.info(
                    "Engine is not there yet",
                    extra={"action": "engine_awaited", "engine": member.id, "reason": fault},
                )
                member.reason = in_public(fault)
            return
        boot_id = await member.engine.boot_id()
        if boot_id != member.boot_id:
            await self._meet(member, boot_id)
        elif member.may_have_forgotten and not member.lock.locked():  # else at the next look
            await self._compare(member)
        if member.status is not EngineStatus.READY or not self._has_wanted(member):
            await self._restore(member)

    async def _meet(self, member: Member, boot_id: str) -> None:
        """Reset the mirror for a new engine process; its adapters are unproven."""
        if member.status is EngineStatus.READY:
            member.status = EngineStatus.LOADING
        async with member.lock:  # a load under way ends first, and is in the list then
            names = await self._list_adapters(member)
            await self._check_prompts(member)
            member.status, member.reason = EngineStatus.LOADING, "restoring its adapters"
            member.boot_id, member.may_have_forgotten = boot_id, False
            member.parses_tools, member.tools_retry_at = None, 0.0
            member.base_figures.clear()
            member.retry_at.clear()
            member.problems.clear()
            member.loaded = OrderedDict.fromkeys(names)
        logger.info(
            "Engine met",
            extra={"action": "engine_met", "engine": member.id, "adapters": len(member.loaded)},
        )

    async def _check_prompts(self, member: Member) -> None:
        """Raises EngineError where the engine reads chats otherwise than the base's template."""
        if self._find_difference is not None:
            difference = await self._find_difference(member.engine)
            if difference is not None:
                raise EngineError(difference)

    async def _compare(self, member: Member) -> None:
        """Make the mirror's names those of the engine, whose process is the one that was met.

        What it still holds stays proven.
        """
        async with member.lock:
            member.may_have_forgotten = False
            names = await self._list_adapters(member)
            for forgotten in member.loaded.keys() - set(names):
                del member.loaded[forgotten]
            for name in names:
                if name not in member.loaded:  # of another gateway, or of a load that broke off
                    member.loaded[name] = None
                    member.loaded.move_to_end(name, last=False)

    async def _list_adapters(self, member: Member) -> list[str]:
        """Names of the adapters on an engine. Raises EngineRefused where it has another base."""
        names = await member.engine.list_models()
        if self.base_name not in names:
            raise EngineRefused(
                404,
                f"it serves {', '.join(sorted(names)) or 'nothing'}, "
                f"the base {self.base_name!r} was expected",
            )
        return [name for name in names if name != self.base_name]

    def _has_wanted(self, member: Member) -> bool:
        return all(self._has(member, release) for release in self._wanted())

    async def _restore(self, member: Member) -> None:
        """Load and prove the releases of roles; one that fails is tried again after a while."""
        required = {release.name: release for release in self._required()}
        releases = {**required, **{release.name: release for release in self._wanted()}}
        for release in releases.values():
            if member.retry_at.get(release.name, 0.0) > self._monotonic():
                continue
            try:
                await self._ensure(member, release)
            except (Unfit, NotReady) as error:
                member.retry_at[release.name] = self._monotonic() + RETRY_SECONDS
                member.problems[release.name] = in_public(str(error))
                logger.error(
                    "Release not restored",
                    extra={
                        "action": "restore_failed",
                        "engine": member.id,
                        "release": release.name,
                        "reason": str(error),
                    },
                )
            else:
                member.retry_at.pop(release.name, None)
                member.problems.pop(release.name, None)
        problems = [text for name, text in member.problems.items() if name in releases]
        member.reason = in_public("; ".join(problems))
        missing = [r for r in required.values() if not self._has(member, r)]
        if missing:
            member.status = EngineStatus.FAILED
        elif member.status is not EngineStatus.READY:
            member.status = EngineStatus.READY
            logger.info("Engine ready", extra={"action": "engine_ready", "engine": member.id})

    def _has(self, member: Member, release: Weights, tolerate_noise: bool = False) -> bool:
        if release.adapter_id is None:
            return True
        proof = member.loaded.get(release.engine_name)
        return proof is not None and self._is_fit(release, proof, tolerate_noise)

    def _fail(self, member: Member, reason: str) -> None:
        """Mark an engine failed: it gets no traffic until a later check finds it healthy.

        What was proven there stays proven while its boot id is the same.
        """
        if member.status is not EngineStatus.FAILED:
            logger.warning(
                "Engine failed",
                extra={"action": "engine_failed", "engine": member.id, "reason": reason},
            )
        member.status, member.reason = EngineStatus.FAILED, in_public(reason)
        member.may_have_forgotten = True

    async def close(self) -> None:
        for member in self.members.values():
            await _dismiss(member)


async def _dismiss(member: Member) -> None:
    """End what goes on with an engine that is followed no longer."""
    for task in (member.look, member.tools_asked):
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await member.engine.close()


async def _read(source: Callable[[str], T], key: str, release: Weights) -> T:
    """Something about `release` from disk or database; Unfit where it is not there."""
    try:
        return await asyncio.to_thread(source, key)
    except OSError as error:
        # Without the path that the system's own errors name: callers read it.
        why = error.strerror or error
        raise Unfit(f"{release.name}: {why}", code="adapter_missing") from None


def managed_address(run_dir: Path) -> list[EngineAddress]:
    """The supervisor's engine as `run/engine.json` says; empty while there is none."""
    try:
        found = json.loads((run_dir / "engine.json").read_text(encoding="utf-8"))
        return [EngineAddress(id="engine-0", url=found["url"], api_key=found["api_key"])]
    except (OSError, ValueError, KeyError):
        return []
