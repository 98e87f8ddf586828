"""Releases and deployments: what can answer under a public name, and the moves between them.

Owns: their rows, the rules for who may be promoted, and the moves as compare-and-set on
`generation`. Does not own the effects of a move on engines
(`server/deployments/promotion.py`) or the weights (`adapters.py`). Functions take the
session first and never commit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from enum import StrEnum
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from feedback.errors import BadRequest, Conflict, NotFound
from tuner.tables import (
    Adapter,
    Decision,
    Deployment,
    DeploymentAlias,
    Evaluation,
    Release,
    ReleaseState,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class Role(StrEnum):
    """What a release is to its deployment: read from the deployment's row, stored nowhere else."""

    PRODUCTION = "production"  #: answers by default
    PREVIOUS = "previous"  #: what a rollback returns to
    CANARY = "canary"  #: answers a share of the people


def create_deployment(
    session: Session,
    *,
    name: str,
    base_model: str,
    base_revision: str,
    template_hash: str | None,
    system_prompt: str | None = None,
    sampling: dict[str, Any] | None = None,
    aliases: Sequence[str] = (),
    policies: dict[str, Any] | None = None,
    created_by: str | None = None,
) -> Deployment:
    """Make a public name, answered by `<name>@0`: the base without adapter.

    Raises `BadRequest` for a name or alias that can't be one, `Conflict` for one that is taken.
    """
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name!r} can't name a deployment: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit.",
            param="name",
        )
    _refuse_taken(session, name, base_model=base_model, param="name")
    deployment = Deployment(name=name, base_model=base_model, policies=policies or {})
    try:
        with session.begin_nested():
            session.add(deployment)
            session.flush()
    except IntegrityError:
        raise _taken(name, "a deployment", "name") from None
    session.add(
        Release(
            name=f"{name}@0",
            deployment=name,
            number=0,
            engine_name=base_model,
            base_model=base_model,
            base_revision=base_revision,
            template_hash=template_hash,
            system_prompt=system_prompt,
            sampling=sampling or {},
            created_by=created_by,
        )
    )
    session.flush()
    set_aliases(session, name, aliases)
    return deployment


def get_deployment(session: Session, name: str) -> Deployment:
    """The deployment of that name (aliases don't count); raises `NotFound`."""
    deployment = session.get(Deployment, name)
    if deployment is None:
        raise NotFound(f"No deployment {name!r}; the list of deployments names those that exist.")
    return deployment


def find_deployment_by_model(session: Session, model: str) -> Deployment | None:
    """The deployment that `model` names, by its own name or an alias; None otherwise."""
    alias = session.get(DeploymentAlias, model)
    return session.get(Deployment, alias.deployment if alias else model)


def list_deployments(session: Session, *, names: Collection[str] | None = None) -> list[Deployment]:
    """Deployments by name; only those in `names` unless it is None."""
    query = select(Deployment).order_by(Deployment.name)
    if names is not None:
        query = query.where(Deployment.name.in_(names))
    return list(session.scalars(query))


def list_aliases(session: Session, deployment: str) -> list[str]:
    """The other names of a deployment, sorted."""
    return list(
        session.scalars(
            select(DeploymentAlias.alias)
            .where(DeploymentAlias.deployment == deployment)
            .order_by(DeploymentAlias.alias)
        )
    )


def set_aliases(session: Session, deployment: str, aliases: Sequence[str]) -> None:
    """Replace all aliases of a deployment.

    Raises `BadRequest`, or `Conflict` for one that is taken.
    """
    row = get_deployment(session, deployment)
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise BadRequest(
                f"{alias!r} can't be an alias: use 1 to 128 letters, digits, '.', '_', ':', '/' "
                "and '-', beginning with a letter or digit.",
                param="aliases",
            )
    session.execute(delete(DeploymentAlias).where(DeploymentAlias.deployment == deployment))
    for alias in dict.fromkeys(aliases):
        _refuse_taken(session, alias, base_model=row.base_model, param="aliases")
        try:
            with session.begin_nested():
                session.add(DeploymentAlias(alias=alias, deployment=deployment))
                session.flush()
        except IntegrityError:
            raise _taken(alias, "an alias", "aliases") from None


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


def check_promotable(
    session: Session,
    deployment: Deployment,
    release: Release,
    *,
    by_machine: bool,
    note: str | None,
    force: bool,
) -> Evaluation | None:
    """Raise `Conflict` or `BadRequest` unless `release` may become production.

    Returns the evaluation that allows it. A passed one against the present production is enough. An
    inconclusive one takes a person and a note. `force` and a note skip the rest: no evaluation, a
    stale one, a failed one. Nothing skips the state of the release, and a machine never forces.
    Integrity and proof on the engines are checked elsewhere, always.
    """
    name, production = release.name, f"{deployment.name}@{deployment.production}"
    noted = bool(note and note.strip())
    if release.deployment != deployment.name:
        raise BadRequest(
            f"{name!r} is a release of {release.deployment!r}, not of {deployment.name!r}.",
            param="release",
        )
    if release.number == deployment.production:
        raise Conflict(f"{name!r} is already production.", code="already_production")
    if release.state in (ReleaseState.DISCARDED, ReleaseState.FAILED):
        because = f" ({release.state_reason})" if release.state_reason else ""
        raise Conflict(
            f"{name!r} is {release.state}{because} and can't be promoted; promote another release.",
            code=f"release_{release.state}",
        )
    if force and (by_machine or not noted):
        raise BadRequest(
            "force takes a person and a note that says why; send `note`.", param="note"
        )
    if release.state == ReleaseState.UNPROVEN and (by_machine or not noted):
        raise Conflict(
            f"{name!r} is unproven ({release.state_reason}); a person may accept that with a note.",
            code="unproven",
        )
    evaluation = newest_evaluation(session, name)
    if force:
        return evaluation
    if evaluation is None:
        raise Conflict(
            f"{name!r} has no finished evaluation; evaluate it, or send force and a note.",
            code="not_evaluated",
        )
    if evaluation.baseline != production:
        raise Conflict(
            f"{name!r} was compared with {evaluation.baseline!r}, but production is {production!r} "
            "now; evaluate it again, or send force and a note.",
            code="stale_evaluation",
        )
    why = " ".join(evaluation.reasons)
    if evaluation.decision == Decision.FAIL:
        raise Conflict(
            f"{name!r} failed its evaluation {evaluation.id}: {why} Promoting it all the same "
            "takes force and a note.",
            code="evaluation_failed",
        )
    if evaluation.decision == Decision.INCONCLUSIVE and (by_machine or not noted):
        raise Conflict(
            f"The evaluation {evaluation.id} of {name!r} is inconclusive: {why} A person may "
            "promote it with a note.",
            code="evaluation_inconclusive",
        )
    return evaluation


def move_production(
    session: Session, deployment: str, number: int, *, expected_generation: int
) -> Deployment:
    """Make release `number` production: one row, compared and set.

    The old production becomes previous. A canary ends with it: won when it is the promoted one,
    void otherwise. Raises `Conflict` when somebody moved first (`generation_conflict`) or the
    release was put away meanwhile.
    """
    row = _move(
        session,
        deployment,
        expected_generation,
        Deployment.production != number,
        production=number,
        previous=Deployment.production,
        rolled_back=False,
    )
    # Read after the row was taken: a discard of this release waits for it, or was seen.
    state = session.scalar(
        select(Release.state).where(Release.deployment == deployment, Release.number == number)
    )
    if state not in (ReleaseState.CANDIDATE, ReleaseState.UNPROVEN):
        raise Conflict(
            f"'{deployment}@{number}' is {state or 'unknown'} and can't be promoted.",
            code=f"release_{state or 'unknown'}",
        )
    return row


def swap_back(session: Session, deployment: str, *, expected_generation: int) -> Deployment:
    """Roll back: production and previous change places, a canary is void.

    Raises `Conflict` (`nothing_to_roll_back_to`, `generation_conflict`).
    """
    row = session.get(Deployment, deployment, populate_existing=True)
    if row is not None and row.previous is None and row.generation == expected_generation:
        raise Conflict(
            f"{deployment!r} has no previous release; promote one by name instead.",
            code="nothing_to_roll_back_to",
        )
    return _move(
        session,
        deployment,
        expected_generation,
        Deployment.previous.is_not(None),
        production=Deployment.previous,
        previous=Deployment.production,
        rolled_back=True,
    )


def _move(
    session: Session, name: str, expected_generation: int, condition: Any, **roles: Any
) -> Deployment:
    moved = session.execute(
        update(Deployment)
        .where(Deployment.name == name, Deployment.generation == expected_generation, condition)
        .values(
            **roles,
            generation=Deployment.generation + 1,
            canary=None,
            canary_percent=0.0,
            canary_id=None,
        )
        .returning(Deployment.name)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    row = session.get(Deployment, name, populate_existing=True)
    if row is None:
        raise NotFound(f"No deployment {name!r}; the list of deployments names those that exist.")
    if moved is None:
        if row.generation == expected_generation:
            raise Conflict(
                f"'{name}@{row.production}' is already production.", code="already_production"
            )
        raise Conflict(
            f"{name!r} is at generation {row.generation}, expected {expected_generation}: somebody "
            "moved it meanwhile; look at it and try again.",
            code="generation_conflict",
        )
    return row


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


def _refuse_taken(session: Session, name: str, *, base_model: str, param: str) -> None:
    bases = select(Deployment.name).where(Deployment.base_model == name).limit(1)
    if name == base_model or session.scalar(bases) is not None:
        raise _taken(name, "the name of a base model", param)
    if session.get(Deployment, name) is not None:
        raise _taken(name, "a deployment", param)
    if session.get(DeploymentAlias, name) is not None:
        raise _taken(name, "an alias", param)


def _taken(name: str, by: str, param: str) -> Conflict:
    return Conflict(
        f"{name!r} is already {by}; choose another name.", param=param, code="name_taken"
    )
