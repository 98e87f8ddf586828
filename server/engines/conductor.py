"""Meets engines, has them hold what roles need, and publishes the picture of it.

Owns: which engines there are, whether each is well, what is restored on one that has forgotten, the
evaluation slot, and that every change is in a picture before anything else happens. Covered: an
engine that restarts, a conductor that restarts beside a running engine, a load that answers 200 and
does nothing. An engine is judged by its health and boot id alone: a failed request takes it from
nobody. Does not own: how an adapter is loaded and proven (`loading.py`), requests (`chooser.py`),
the moves of releases (`server/deployments/promotion.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from feedback.errors import NotReady
from server.engines.base import Engine, EngineAddress, EngineError, EngineUnreachable
from server.engines.loading import Loader, Mirror, Unfit
from server.engines.needs import EvaluationSlot, Needs
from server.engines.picture import (
    LOOK_PAUSE_SECONDS,
    EngineStatus,
    EngineView,
    Picture,
    Roles,
    Traffic,
    Weights,
)
from server.engines.proof import Proof
from server.engines.reasons import in_public

logger = logging.getLogger(__name__)

RETRY_SECONDS = 15.0
"""Pause before a release that an engine could not restore is tried there again."""


@dataclass(slots=True)
class Member:
    """One engine and how the conductor stands with it."""

    mirror: Mirror
    status: EngineStatus = EngineStatus.LOADING
    reason: str = "not reached yet"  #: for everybody to read: `in_public`
    boot_id: str | None = None
    retry_at: dict[str, float] = field(
        default_factory=dict
    )  #: releases that failed to restore, by name
    problems: dict[str, str] = field(default_factory=dict)
    attention: asyncio.Lock = field(default_factory=asyncio.Lock)  #: one look at a time
    may_have_forgotten: bool = False  #: the mirror's names are to be compared with the engine's
    doubts: int = 0  #: loads and unloads that failed here since the last look at it began
    look: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Engine:
        return self.mirror.engine

    @property
    def id(self) -> str:
        return self.mirror.id


class Conductor:
    """All engines of one base. One event loop owns it; nothing here blocks on the database.

    `picture` says what all engines have in common, and is where the first one that is published
    begins; `publish` gets each new one. `traffic` says what requests do on the engines.
    `find_difference(engine)` says why an engine that was just met may not answer at all.
    `reference` and `path` are the loader's.
    """

    def __init__(
        self,
        picture: Picture,
        *,
        addresses: Callable[[], Iterable[EngineAddress]],
        connect: Callable[[EngineAddress], Engine],
        reference: Callable[[str], Mapping[str, Any]],
        path: Callable[[str], str],
        traffic: Traffic,
        publish: Callable[[Picture], None],
        find_difference: Callable[[Engine], Awaitable[str | None]] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.members: dict[str, Member] = {}
        self.needs = Needs(monotonic)
        self.loader = Loader(
            base_name=picture.base_name,
            capacity=picture.capacity,
            traits=picture.traits,
            reference=reference,
            path=path,
            needs=self.needs,
            traffic=traffic,
            changed=self._publish,
            monotonic=monotonic,
        )
        self._picture = picture
        self._addresses = addresses
        self._connect = connect
        self._publish_picture = publish
        self._find_difference = find_difference
        self._monotonic = monotonic

    # What has to be where

    def assign(self, roles: Roles) -> None:
        """Deployments point at these releases from now on."""
        if roles != self.needs.roles:
            self.needs.roles = roles
            self._publish()

    @contextmanager
    def keep(self, release: Weights) -> Iterator[None]:
        """Nothing unloads `release` during the block: it is on its way to a role."""
        try:
            with self.needs.keep(release):
                self._publish()
                yield
        finally:
            self._publish()

    async def prepare(self, release: Weights, *, tolerate_noise: bool = False) -> dict[str, Proof]:
        """Load `release` on every ready engine and prove it there; proofs by engine id.

        `tolerate_noise` lets a release answer whose effect the engine's noise hides: for its
        evaluation only. Raises NotReady where no engine is ready or none has a slot, Unfit where an
        engine does not answer with these weights (it is unloaded there again). Until something
        needs the release, the next move may unload it: see `keep`, and `Hold` of requests.
        """
        ready = [m for m in self.members.values() if m.status is EngineStatus.READY]
        if not ready:
            raise NotReady(self._picture.explain_not_ready(), code="engine_not_ready")
        proofs: dict[str, Proof] = {}
        for member in ready:
            try:
                proof = await self.loader.ensure(
                    member.mirror, release, tolerate_noise=tolerate_noise
                )
            except EngineError as error:
                self._doubt(member, str(error))
                continue
            if proof is not None:
                proofs[member.id] = proof
        if release.adapter_id is not None and not proofs:
            raise NotReady(
                f"no engine could load {release.name!r} just now; try again",
                code="engine_not_ready",
            )
        return proofs

    async def trim(self) -> None:
        """Unload what nothing needs: no role, no evaluation, no request."""
        for member in list(self.members.values()):
            try:
                await self.loader.trim(member.mirror)
            except EngineError as error:
                self._doubt(member, str(error))

    async def take_evaluation_slot(
        self, release: Weights, token: str, seconds: float
    ) -> EvaluationSlot:
        """Load and prove `release`, and keep it for `seconds` unless that is renewed.

        Raises NotReady when another release is under evaluation, or none can load this one, and
        Unfit when an engine does not answer with it.
        """
        # However long the load takes, nothing else gets the slot; then the time begins.
        self.needs.take_slot(release, token)
        self._publish()
        try:
            await self.prepare(release, tolerate_noise=True)
        except BaseException:
            self.give_evaluation_slot_back(token)
            raise
        return self.needs.renew_slot(token, seconds)

    def renew_evaluation_slot(self, token: str, seconds: float) -> EvaluationSlot:
        """Keep the slot for another `seconds`. Raises Conflict when it was lost."""
        return self.needs.renew_slot(token, seconds)

    def give_evaluation_slot_back(self, token: str) -> None:
        """The evaluation has ended; unknown ones have ended already."""
        self.needs.give_slot_back(token)
        self._publish()

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

    async def look_at(self, engine_id: str) -> None:
        """Something failed on that engine: see whether it is well and has forgotten nothing."""
        member = self.members.get(engine_id)
        if member is not None:
            member.may_have_forgotten = True
            await self._attend(member)

    def _doubt(self, member: Member, reason: str) -> None:
        """A load or an unload failed on `member`: look at it, aside.

        Until then requests prefer other engines.
        """
        if self.members.get(member.id) is not member:
            return
        if not member.doubts:
            logger.info(
                "Engine suspected",
                extra={"action": "engine_suspected", "engine": member.id, "reason": reason},
            )
        member.doubts += 1
        member.may_have_forgotten = True
        self._publish(member.id)
        self._look_aside(member)

    def _look_aside(self, member: Member) -> None:
        if member.look is None or member.look.done():
            member.look = asyncio.create_task(self._look(member))

    async def _look(self, member: Member) -> None:
        await self._attend(member)
        while member.doubts and self.members.get(member.id) is member:  # more came meanwhile
            await asyncio.sleep(LOOK_PAUSE_SECONDS)
            await self._attend(member)

    async def _find_members(self) -> None:
        """One member for each address that there is now."""
        addresses = {address.id: address for address in self._addresses()}
        for gone in self.members.keys() - addresses.keys():
            member = self.members.pop(gone)
            self._publish()
            await _dismiss(member)
        for address in addresses.values():
            before = self.members.get(address.id)
            if before is None or before.engine.address != address:
                self.members[address.id] = Member(Mirror(self._connect(address)))
                self._publish()
                if before is not None:
                    await _dismiss(before)

    async def _attend(self, member: Member) -> None:
        """Look at one engine, whose trouble is not the others'."""
        async with member.attention:
            if self.members.get(member.id) is not member:
                return  # another has its place by now, and this one's connections are closed
            doubts = member.doubts
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
            if member.doubts == doubts:
                member.doubts = 0
            self._publish(member.id)

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
        elif member.may_have_forgotten and not member.mirror.lock.locked():  # else at the next look
            await self._compare(member)
        if member.status is not EngineStatus.READY or not self._has_wanted(member):
            await self._restore(member)

    async def _meet(self, member: Member, boot_id: str) -> None:
        """Reset the mirror for a new engine process; its adapters are unproven."""
        if member.status is EngineStatus.READY:
            member.status = EngineStatus.LOADING
            self._publish(member.id)
        mirror = member.mirror
        async with mirror.lock:  # a load under way ends first, and is in the list then
            names = await self.loader.list_adapters(mirror)
            await self._check_prompts(member)
            member.status, member.reason = EngineStatus.LOADING, "restoring its adapters"
            member.boot_id, member.may_have_forgotten = boot_id, False
            member.retry_at.clear()
            member.problems.clear()
            mirror.forget(names)
            self._publish(member.id)
        logger.info(
            "Engine met",
            extra={"action": "engine_met", "engine": member.id, "adapters": len(mirror.loaded)},
        )

    async def _check_prompts(self, member: Member) -> None:
        """Raises EngineError where the engine reads chats otherwise than the base's template."""
        if self._find_difference is not None:
            difference = await self._find_difference(member.engine)
            if difference is not None:
                raise EngineError(difference)

    async def _compare(self, member: Member) -> None:
        async with member.mirror.lock:
            member.may_have_forgotten = False
            member.mirror.compare(await self.loader.list_adapters(member.mirror))
            self._publish(member.id)

    def _has_wanted(self, member: Member) -> bool:
        return all(self.loader.has(member.mirror, r) for r in self.needs.roles.wanted)

    async def _restore(self, member: Member) -> None:
        """Load and prove the releases of roles; one that fails is tried again after a while."""
        roles = self.needs.roles
        releases = {release.name: release for release in (*roles.required, *roles.wanted)}
        for release in releases.values():
            if member.retry_at.get(release.name, 0.0) > self._monotonic():
                continue
            try:
                await self.loader.ensure(member.mirror, release)
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
        if not all(self.loader.has(member.mirror, release) for release in roles.required):
            member.status = EngineStatus.FAILED
        elif member.status is not EngineStatus.READY:
            member.status = EngineStatus.READY
            logger.info("Engine ready", extra={"action": "engine_ready", "engine": member.id})

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

    def _publish(self, changed: str | None = None) -> None:
        """Have requests go by what is known now, if that is news.

        `changed` is the engine that alone may have changed; None: any of them.
        """
        members = self.members
        if changed is None:
            engines = {member.id: self._view(member) for member in members.values()}
        else:
            engines = dict(self._picture.engines)
            if changed in members:
                engines[changed] = self._view(members[changed])
        picture = replace(
            self._picture,
            capacity=self.loader.capacity,
            traits=dict(self.loader.traits),
            roles=self.needs.roles,
            moving=self.needs.moving(),
            under_evaluation=self.needs.under_evaluation(),
            engines=engines,
        )
        if picture != self._picture:
            self._picture = replace(picture, version=picture.version + 1)
            self._publish_picture(self._picture)

    def _view(self, member: Member) -> EngineView:
        return EngineView(
            address=member.engine.address,
            status=member.status,
            reason=member.reason,
            boot_id=member.boot_id,
            slots=self.loader.slots(member.mirror),
            adapters={name: loaded.proof for name, loaded in member.mirror.loaded.items()},
            is_doubted=member.doubts > 0,
        )

    async def close(self) -> None:
        """End the looks that are under way, and the connections to engines."""
        for member in self.members.values():
            await _dismiss(member)


async def _dismiss(member: Member) -> None:
    """End what goes on with an engine that is followed no longer."""
    if member.look is not None:
        member.look.cancel()
        await asyncio.gather(member.look, return_exceptions=True)
    await member.engine.close()
