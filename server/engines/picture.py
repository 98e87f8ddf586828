"""The engines at one moment, as requests and `/readyz` read them.

Owns: the value that the conductor publishes and choosers read (`Picture`), what follows from it
alone, and what the conductor is told of requests in return (`Traffic`). Nothing else passes between
the two. A picture is replaced as a whole and never changed. Does not own: how it comes about
(`conductor.py`), or which engine a request gets (`chooser.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any, Protocol

from server.engines.base import EngineAddress
from server.engines.proof import Outcome, Proof

LOOK_PAUSE_SECONDS = 0.1  #: between two looks at an engine on which something keeps failing
MOST_EXPLAINED = 3  #: engines whose state a 503 tells; `readyz` lists them all


class EngineStatus(StrEnum):
    LOADING = "loading"  #: not reached yet, or restoring its adapters
    READY = "ready"  #: answers, with every release of a role proven
    FAILED = "failed"  #: answered before and does not now, or cannot hold a release


class Weights(Protocol):
    """What engines need to know of a release; `routing.ReleaseView` is one."""

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


@dataclass(frozen=True, slots=True)
class Roles:
    """The releases that deployments point at."""

    required: tuple[Weights, ...] = ()  #: in production: without them an engine gets no traffic
    wanted: tuple[Weights, ...] = ()  #: of all roles: they stay loaded


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine in a picture."""

    address: EngineAddress
    status: EngineStatus
    reason: str  #: for everybody to read: `in_public`; empty where there is nothing to say
    boot_id: str | None  #: None: not met yet
    slots: int  #: adapters that it may hold
    adapters: Mapping[str, Proof | None] = field(default_factory=dict)
    """What it holds, by engine name; None: not proven yet."""
    is_doubted: bool = False  #: a load or an unload failed there, and it was not looked at since

    @property
    def id(self) -> str:
        return self.address.id

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.status is EngineStatus.READY

    def proven(self) -> set[str]:
        """Engine names that have a proof there."""
        return {name for name, proof in self.adapters.items() if proof is not None}


@dataclass(frozen=True, slots=True)
class Picture:
    """What is known of all engines at one moment.

    `capacity` is how many adapters an engine may hold by the settings. `traits` is what the
    engines' noise depends on: a person's acceptance of an unproven release holds where it names the
    same.
    """

    base_name: str
    capacity: int
    traits: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0  #: grows with every change
    roles: Roles = Roles()
    moving: frozenset[str] = frozenset()  #: engine names on their way to a role
    under_evaluation: frozenset[str] = frozenset()  #: engine names in the evaluation slot
    engines: Mapping[str, EngineView] = field(default_factory=dict)  #: by id
    ready: tuple[EngineView, ...] = field(init=False, compare=False)  #: those that take requests

    def __post_init__(self) -> None:
        ready = (engine for engine in self.engines.values() if engine.is_ready)
        object.__setattr__(self, "ready", tuple(ready))

    @property
    def is_ready(self) -> bool:
        """Whether some engine takes requests."""
        return bool(self.ready)

    def list_ready_for(self, engine_name: str) -> list[EngineView]:
        """The engines that may be asked for `engine_name`: the base, or what is proven there."""
        if engine_name == self.base_name:
            return list(self.ready)
        return [engine for engine in self.ready if engine.adapters.get(engine_name) is not None]

    def serves(self, release: Weights, *, tolerate_noise: bool = False) -> bool:
        """True when some engine may answer with `release` now."""
        if release.adapter_id is None:
            return self.is_ready
        proofs = (engine.adapters.get(release.engine_name) for engine in self.ready)
        return any(
            proof is not None and is_fit(release, proof, self.traits, tolerate_noise=tolerate_noise)
            for proof in proofs
        )

    def in_roles(self) -> set[str]:
        """Engine names of what has a role, or is on its way to one."""
        return {release.engine_name for release in self.roles.wanted} | self.moving

    def smallest_slots(self) -> int:
        """How many adapters every engine can hold, for they hold the same."""
        return min((engine.slots for engine in self.engines.values()), default=self.capacity)

    def explain_not_ready(self) -> str:
        """One sentence for `readyz` and for callers."""
        if not self.engines:
            return "no engine is there yet; it is starting or none is configured"
        states = [
            f"{engine.id} is {engine.status}: {engine.reason}"
            for engine in islice(self.engines.values(), MOST_EXPLAINED)
        ]
        if len(self.engines) > MOST_EXPLAINED:
            states.append(f"{len(self.engines) - MOST_EXPLAINED} more")
        return f"no engine is ready ({'; '.join(states)})"


def is_fit(
    release: Weights, proof: Proof, traits: Mapping[str, Any], *, tolerate_noise: bool = False
) -> bool:
    """Whether an engine with that proof may answer with `release`.

    `tolerate_noise` lets it answer though the engine's noise hides its effect: for its evaluation.
    """
    if proof.outcome is not Outcome.UNPROVEN:
        return proof.outcome is Outcome.PROVEN
    accepted = release.acceptance
    return tolerate_noise or (
        accepted is not None and all(accepted.get(key) == value for key, value in traits.items())
    )


class Traffic(Protocol):
    """What the conductor is told of requests: of those that go by its pictures."""

    def held(self) -> AbstractSet[str]:
        """Engine names that requests keep loaded, whether they run already or not."""

    def is_running(self, engine_id: str, engine_name: str) -> bool:
        """Whether a request runs on that adapter of that engine."""

    def last_used(self, engine_id: str, engine_name: str) -> float:
        """When a request last began there, in seconds of the conductor's clock; 0: never."""
