"""Reads from the database what the gateway answers from memory: deployments, releases, keys.

Owns: loading, and the object that holds the newest snapshot. Does not own: the rules (`routing.py`,
`access/keyring.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.db import Database
from server.access.keyring import Keyring, load_keyring
from server.chat.routing import DeploymentView, ReleaseView, Snapshot
from tuner.tables import Adapter, Deployment, DeploymentAlias, Release

logger = logging.getLogger(__name__)

MOST_SERVED = 256


def load_release(session: Session, name: str) -> ReleaseView | None:
    """One release as routing sees it."""
    row = session.execute(
        select(Release, Adapter.content_hash)
        .outerjoin(Adapter, Adapter.id == Release.adapter_id)
        .where(Release.name == name)
    ).first()
    return None if row is None else _view(row[0], row[1])


def load_snapshot(session: Session, base_model: str, served: Iterable[str]) -> Snapshot:
    """The present state; `served` names releases beyond the roles that some engine holds."""
    deployments = list(session.scalars(select(Deployment)))
    wanted = set(served)
    for row in deployments:
        numbers = (row.production, row.previous, row.canary)
        wanted.update(f"{row.name}@{number}" for number in numbers if number is not None)
    found = session.execute(
        select(Release, Adapter.content_hash)
        .outerjoin(Adapter, Adapter.id == Release.adapter_id)
        .where(Release.name.in_(wanted))
    )
    releases = {release.name: _view(release, content_hash) for release, content_hash in found}
    views = {row.name: _deployment_view(row, releases) for row in deployments}
    aliases = {row.alias: row.deployment for row in session.scalars(select(DeploymentAlias))}
    return Snapshot(base_model=base_model, deployments=views, aliases=aliases, served=releases)


def _view(release: Release, content_hash: str | None) -> ReleaseView:
    return ReleaseView(
        name=release.name,
        deployment=release.deployment,
        number=release.number,
        engine_name=release.engine_name,
        adapter_id=release.adapter_id,
        adapter_hash=content_hash,
        base_revision=release.base_revision,
        template_hash=release.template_hash,
        system_prompt=release.system_prompt,
        sampling=release.sampling,
        state=release.state,
        acceptance=release.acceptance,
    )


def _deployment_view(row: Deployment, releases: dict[str, ReleaseView]) -> DeploymentView:
    def role(number: int | None) -> ReleaseView | None:
        return None if number is None else releases[f"{row.name}@{number}"]

    policies = row.policies or {}
    kwargs = policies.get("template_kwargs")
    return DeploymentView(
        name=row.name,
        base_model=row.base_model,
        generation=row.generation,
        production=releases[f"{row.name}@{row.production}"],
        previous=role(row.previous),
        canary=role(row.canary),
        canary_percent=row.canary_percent,
        canary_id=row.canary_id,
        rolled_back=row.rolled_back,
        prepend=policies.get("system_prompt") == "prepend",
        **({} if kwargs is None else {"template_kwargs": frozenset(kwargs)}),
    )


class Directory:
    """The newest snapshot and keyring. Reading is a plain attribute; `refresh` replaces both.

    `before_flip` makes the engines ready for a snapshot; it is entered before answers go by it.
    """

    def __init__(
        self,
        database: Database,
        base_model: str,
        before_flip: Callable[[Snapshot], AbstractAsyncContextManager[None]] | None = None,
        token_secret: str | None = None,
    ) -> None:
        self._database = database
        self._before_flip = before_flip
        self._served: dict[str, None] = {}
        self._lock = asyncio.Lock()
        self.snapshot = Snapshot(base_model=base_model)
        self._token_secret = token_secret
        self.keyring = Keyring({}, token_secret)

    async def refresh(self) -> None:
        """Read everything again from the database.

        Waits for a refresh that is under way and then reads anew, so what was committed before the
        call is seen after it.
        """
        async with self._lock:
            snapshot, self.keyring = await asyncio.to_thread(self._load)
            if self._before_flip is None:
                self.snapshot = snapshot
                return
            async with self._before_flip(snapshot):
                self.snapshot = snapshot

    def remember(self, release: str) -> None:
        """Name a release beyond the roles that engines hold; refreshes have it from now on.

        The newest are kept: under evaluation, or pinned by a caller.
        """
        self._served.pop(release, None)
        self._served[release] = None
        while len(self._served) > MOST_SERVED:
            del self._served[next(iter(self._served))]

    def _load(self) -> tuple[Snapshot, Keyring]:
        with self._database.read() as session:
            snapshot = load_snapshot(session, self.snapshot.base_model, tuple(self._served))
            return snapshot, load_keyring(session, self._token_secret)

    async def follow(self, interval_seconds: float) -> None:
        """Refresh for ever; a database that is away leaves the last snapshot in force."""
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                await self.refresh()
            except Exception:
                logger.exception(
                    "Directory not refreshed", extra={"action": "directory_not_refreshed"}
                )
