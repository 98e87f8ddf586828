"""Releases: what can answer under a public name.

Owns: their rows, their states, and what a release is to its deployment. Does not own the names
(`deployments.py`), the moves between releases (`moves.py`) or the weights (`adapters.py`).
Functions take the session first and never commit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.errors import Conflict, NotFound
from tuner.tables import Adapter, Deployment, Evaluation, Release, ReleaseState


class Role(StrEnum):
    """What a release is to its deployment: read from the deployment's row, stored nowhere else."""

    PRODUCTION = "production"  #: answers by default
    PREVIOUS = "previous"  #: what a rollback returns to
    CANARY = "canary"  #: answers a share of the people


def find_release(session: Session, name: str) -> Release | None:
    """The release `assistant@7`, or None."""
    return session.get(Release, name)


def get_release(session: Session, name: str) -> Release:
    """The release `assistant@7`; raises `NotFound`."""
    release = find_release(session, name)
    if release is None:
        raise NotFound(f"No release {name!r}; the list of releases names those that exist.")
    return release


def list_releases(
    session: Session,
    *,
    deployments: Collection[str] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Release], bool]:
    """A page of releases, by deployment, newest first in each, and whether more follow."""
    query = select(Release).order_by(Release.deployment, Release.number.desc()).limit(limit + 1)
    if deployments is not None:
        query = query.where(Release.deployment.in_(deployments))
    if after is not None:
        last = get_release(session, after)
        query = query.where(
            (Release.deployment > last.deployment)
            | ((Release.deployment == last.deployment) & (Release.number < last.number))
        )
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def role_of(deployment: Deployment, number: int) -> Role | None:
    """What release `number` is to its deployment at this moment."""
    roles = {
        deployment.canary: Role.CANARY,
        deployment.previous: Role.PREVIOUS,
        deployment.production: Role.PRODUCTION,
    }
    return roles.get(number)


def production_of(session: Session, deployment: Deployment) -> Release:
    """The release that answers by default."""
    return get_release(session, f"{deployment.name}@{deployment.production}")


def create_release(
    session: Session,
    deployment: Deployment,
    *,
    adapter: Adapter | None,
    system_prompt: str | None,
    sampling: dict[str, Any],
    job_id: str | None = None,
    suffix: str | None = None,
    dataset_id: str | None = None,
    sources_left_out: Sequence[str] = (),
    created_by: str | None = None,
) -> Release:
    """Make the next candidate of a deployment.

    The engine knows an adapter under one name per deployment, so a release with the same adapter
    and another prompt needs no further slot. Raises `Conflict` when the adapter was trained for
    another base.
    """
    # The deployment's row is held, so that two candidates made at once get two numbers.
    session.execute(
        select(Deployment.name).where(Deployment.name == deployment.name).with_for_update()
    )
    number = (
        session.scalar(
            select(func.max(Release.number)).where(Release.deployment == deployment.name)
        )
        or 0
    ) + 1
    origin = get_release(session, f"{deployment.name}@0")
    found = origin if adapter is None else adapter
    if (found.base_model, found.base_revision) != (origin.base_model, origin.base_revision):
        raise Conflict(
            f"The adapter was trained for {found.base_model!r} at {found.base_revision!r}, but "
            f"{deployment.name!r} serves {origin.base_model!r} at {origin.base_revision!r}; "
            "train it on that base.",
            code="wrong_base",
        )
    release = Release(
        name=f"{deployment.name}@{number}",
        deployment=deployment.name,
        number=number,
        adapter_id=adapter.id if adapter else None,
        engine_name=_engine_name(session, deployment, number, adapter),
        base_model=origin.base_model,
        base_revision=origin.base_revision,
        template_hash=found.template_hash or origin.template_hash,
        system_prompt=system_prompt,
        sampling=sampling,
        state=ReleaseState.CANDIDATE,
        job_id=job_id,
        suffix=suffix,
        dataset_id=dataset_id,
        sources_left_out=list(sources_left_out),
        created_by=created_by,
    )
    session.add(release)
    session.flush()
    return release


def discard(session: Session, name: str, *, reason: str | None = None) -> Release:
    """Put a release away for good. Raises `Conflict` while it has a role."""
    release = get_release(session, name)
    deployment = session.scalars(
        select(Deployment)
        .where(Deployment.name == release.deployment)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    role = role_of(deployment, release.number)
    if role is not None:
        raise Conflict(
            f"{name!r} is {role} of {deployment.name!r}; promote another release first, or end the "
            "canary.",
            code="release_in_use",
        )
    release.state = ReleaseState.DISCARDED
    release.state_reason = reason
    session.flush()
    return release


def mark_failed(session: Session, name: str, reason: str) -> Release:
    """An engine showed that the release's adapter does nothing or the wrong thing."""
    return _set_state(session, name, ReleaseState.FAILED, reason)


def set_unproven(session: Session, name: str, reason: str) -> Release:
    """An engine's noise hides whether the adapter works; a person may accept that."""
    return _set_state(session, name, ReleaseState.UNPROVEN, reason)


def accept_unproven(session: Session, name: str, acceptance: dict[str, Any]) -> Release:
    """Store who accepted an unproven release, why, and for which engines."""
    release = get_release(session, name)
    release.acceptance = acceptance
    session.flush()
    return release


def newest_evaluation(session: Session, release: str) -> Evaluation | None:
    """The release's newest evaluation that has decided, or None."""
    return session.scalar(
        select(Evaluation)
        .where(Evaluation.release == release, Evaluation.decision.is_not(None))
        .order_by(Evaluation.finished_at.desc(), Evaluation.id.desc())
        .limit(1)
    )


def _set_state(session: Session, name: str, state: ReleaseState, reason: str) -> Release:
    release = get_release(session, name)
    if release.state != ReleaseState.DISCARDED:
        release.state = state
        release.state_reason = reason
        session.flush()
    return release


def _engine_name(
    session: Session, deployment: Deployment, number: int, adapter: Adapter | None
) -> str:
    if adapter is None:
        return deployment.base_model
    known = session.scalar(
        select(Release.engine_name)
        .where(Release.deployment == deployment.name, Release.adapter_id == adapter.id)
        .limit(1)
    )
    return known or f"{deployment.name}-{number}-{adapter.content_hash[:8]}"
