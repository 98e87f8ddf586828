"""Moves: which release of a deployment becomes production, and when it may.

Owns: the rules for who may be promoted, and the moves as compare-and-set on `generation`. Does not
own the effects of a move on engines (`server/deployments/promotion.py`). Functions take the session
first and never commit.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from feedback.errors import BadRequest, Conflict, NotFound
from tuner.releases import newest_evaluation
from tuner.tables import Decision, Deployment, Evaluation, Release, ReleaseState


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
