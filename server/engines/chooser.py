"""Which engine a request gets, and what requests do on the engines.

Owns: the choice by the newest picture, the gateway's own connections for requests, the counts of
what runs and of what requests keep loaded, and what follows from a request that failed: others
prefer another engine until somebody has looked at that one, for an engine is judged by its health
and boot id alone. Does not own: how an adapter gets onto an engine, or whether one is well
(`conductor.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from collections.abc import Set as AbstractSet

from feedback.errors import NotReady
from server.engines.base import Engine, EngineAddress
from server.engines.picture import LOOK_PAUSE_SECONDS, Picture, Weights

logger = logging.getLogger(__name__)


class Replica:
    """One engine as requests meet it: a connection, and what of theirs happens there."""

    __slots__ = ("busy", "engine", "id", "is_doubted", "look", "running", "suspicions", "used_at")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.id = engine.address.id
        self.running: dict[str, int] = {}  #: requests by engine name
        self.busy = 0  #: all of them
        self.used_at: dict[str, float] = {}  #: when a request last began, by engine name
        self.is_doubted = False  #: by the conductor
        self.suspicions = 0  #: requests that failed here since the last look at it began
        self.look: asyncio.Task[None] | None = None


class Run:
    """One request that runs on an engine, for the time of a `with` block."""

    __slots__ = ("_name", "_now", "_replica")

    def __init__(self, replica: Replica, engine_name: str, now: float) -> None:
        self._replica = replica
        self._name = engine_name
        self._now = now

    def __enter__(self) -> None:
        replica, name = self._replica, self._name
        replica.running[name] = replica.running.get(name, 0) + 1
        replica.busy += 1
        replica.used_at[name] = self._now

    def __exit__(self, *_: object) -> None:
        replica, name = self._replica, self._name
        replica.busy -= 1
        replica.running[name] -= 1
        if not replica.running[name]:
            del replica.running[name]


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


class Chooser:
    """The engines for the requests of one gateway. One event loop owns it.

    `picture` is the newest one; `show` replaces it. `look_at(engine_id)` has the conductor look at
    an engine and returns afterwards. Connections to engines are made by `connect`.
    """

    def __init__(
        self,
        picture: Picture,
        *,
        connect: Callable[[EngineAddress], Engine],
        look_at: Callable[[str], Awaitable[None]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.picture = picture
        self.replicas: dict[str, Replica] = {}
        self._connect = connect
        self._look_at = look_at
        self._monotonic = monotonic
        self._held: dict[str, int] = {}  #: what requests keep, how many of them
        self._ready: dict[str, tuple[Replica, ...]] = {}  #: by engine name, of this picture
        self._closing: set[asyncio.Task[None]] = set()

    def show(self, picture: Picture) -> None:
        """Go by `picture` from now on."""
        self.picture = picture
        self._ready.clear()
        for gone in self.replicas.keys() - picture.engines.keys():
            self._dismiss(self.replicas.pop(gone))
        for view in picture.engines.values():
            replica = self.replicas.get(view.id)
            if replica is None or replica.engine.address != view.address:
                self.replicas[view.id] = Replica(self._connect(view.address))
                if replica is not None:
                    self._dismiss(replica)
            else:
                for name in replica.used_at.keys() - view.adapters.keys():
                    del replica.used_at[name]
            self.replicas[view.id].is_doubted = view.is_doubted

    # The choice

    def choose(self, engine_name: str) -> Replica:
        """The least busy engine that has `engine_name` proven. Raises NotReady."""
        ready = self._ready.get(engine_name) or self._find_ready(engine_name)
        if len(ready) == 1:
            return ready[0]
        if not ready:
            raise self._not_ready()
        return min(ready, key=_burden)

    def find_another(self, engine_name: str, than: Replica) -> Replica | None:
        """An engine beside `than` that has `engine_name` proven."""
        others = [replica for replica in self._find_ready(engine_name) if replica is not than]
        return min(others, key=_burden, default=None)

    def check_ready(self) -> None:
        """Raises NotReady where no engine takes requests."""
        if not self.picture.ready:
            raise self._not_ready()

    def _find_ready(self, engine_name: str) -> tuple[Replica, ...]:
        views = self.picture.list_ready_for(engine_name)
        ready = tuple(self.replicas[view.id] for view in views)
        if ready:
            self._ready[engine_name] = ready
        return ready

    def _not_ready(self) -> NotReady:
        return NotReady(self.picture.explain_not_ready(), code="engine_not_ready")

    # What requests do there

    def run(self, replica: Replica, engine_name: str) -> Run:
        """Count one request on `replica`; counted down exactly once, whatever ends the block."""
        return Run(replica, engine_name, self._monotonic())

    def holding(self) -> Hold:
        """A hold for one request, which keeps nothing yet."""
        return Hold(self._held)

    def held(self) -> AbstractSet[str]:
        """Engine names that requests keep loaded."""
        return self._held.keys()

    def is_running(self, engine_id: str, engine_name: str) -> bool:
        """Whether a request runs on that adapter of that engine."""
        replica = self.replicas.get(engine_id)
        return replica is not None and engine_name in replica.running

    def last_used(self, engine_id: str, engine_name: str) -> float:
        """When a request last began there; 0: never."""
        replica = self.replicas.get(engine_id)
        return 0.0 if replica is None else replica.used_at.get(engine_name, 0.0)

    # Requests that fail

    def suspect(self, replica: Replica, reason: str) -> None:
        """A request failed on `replica`: have the engine looked at, aside.

        The failure is the request's. The engine keeps its traffic and its proofs unless the look
        shows that it is not well, is another process, or has forgotten adapters.
        """
        if self.replicas.get(replica.id) is not replica:
            return
        if not replica.suspicions:
            logger.info(
                "Engine suspected",
                extra={"action": "engine_suspected", "engine": replica.id, "reason": reason},
            )
        replica.suspicions += 1
        if replica.look is None or replica.look.done():
            replica.look = asyncio.create_task(self._have_looked_at(replica))

    async def _have_looked_at(self, replica: Replica) -> None:
        while True:
            suspicions = replica.suspicions
            await self._look_at(replica.id)
            if replica.suspicions == suspicions:  # none came while it was looked at
                replica.suspicions = 0
                return
            await asyncio.sleep(LOOK_PAUSE_SECONDS)

    def _dismiss(self, replica: Replica) -> None:
        closing = asyncio.create_task(_close(replica))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End all connections to engines."""
        await asyncio.gather(*self._closing, *map(_close, self.replicas.values()))


def _burden(replica: Replica) -> tuple[bool, int]:
    # One on which something has just failed comes last until it was looked at: what fails at once
    # is never busy.
    return replica.is_doubted or replica.suspicions > 0, replica.busy


async def _close(replica: Replica) -> None:
    if replica.look is not None:
        replica.look.cancel()
        await asyncio.gather(replica.look, return_exceptions=True)
    await replica.engine.close()
