"""Evaluations: a candidate against what is in production, on rows that neither learned from.

Owns: their rows, and which files hold what they are measured on. Does not own the reading of those
(`holdout.py`), the measuring (`measurement.py`) or the decision (`gate.py`). Functions take the
session first and never commit.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.db import new_id, now
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.tables import Dataset, DatasetStatus, File
from tuner.deployments import get_deployment
from tuner.evaluation.gate import GateResult
from tuner.evaluation.holdout import HoldoutFiles
from tuner.evaluation.measurement import Subject
from tuner.jobs import ENDED, create_job
from tuner.releases import get_release, production_of
from tuner.tables import Deployment, Evaluation, Job, JobKind, Release, ReleaseState
from tuner.tuning import list_files_of


def create_evaluation(
    session: Session,
    release: Release,
    baseline: Release | None = None,
    *,
    person_id: str | None = None,
    created_by: str | None = None,
) -> tuple[Evaluation, Job]:
    """Queue a comparison of `release` with `baseline` (default: production).

    The holdout is that of the release's data set, or of the deployment's newest one. Raises
    `BadRequest` when there is nothing to compare, `Conflict` for a release that was put away.
    """
    deployment = get_deployment(session, release.deployment)
    baseline = baseline or production_of(session, deployment)
    if baseline.name == release.name:
        raise BadRequest(
            f"{release.name!r} can't be compared with itself; name another release or a baseline.",
            param="baseline",
        )
    if baseline.deployment != release.deployment:
        raise BadRequest(
            f"{baseline.name!r} is a release of another deployment than {release.name!r}.",
            param="baseline",
        )
    _check_in_use(release)
    evaluation = Evaluation(
        id=new_id("eval_"),
        deployment=deployment.name,
        release=release.name,
        baseline=baseline.name,
        dataset_id=release.dataset_id or _newest_dataset(session, deployment.name),
        created_by=created_by,
    )
    job = create_job(
        session,
        JobKind.EVALUATE,
        spec={"evaluation_id": evaluation.id},
        deployment=deployment.name,
        person_id=person_id,
        created_by=created_by,
    )
    evaluation.job_id = job.id
    session.add(evaluation)
    session.flush()
    return evaluation, job


def get_evaluation(session: Session, evaluation_id: str) -> Evaluation:
    """The evaluation; raises `NotFound`."""
    evaluation = session.get(Evaluation, evaluation_id)
    if evaluation is None:
        raise NotFound(f"No evaluation {evaluation_id!r}; the list of evaluations names them.")
    return evaluation


def list_evaluations(
    session: Session,
    *,
    deployments: Collection[str] | None = None,
    release: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Evaluation], bool]:
    """A page of evaluations, newest first, and whether more follow."""
    query = select(Evaluation).order_by(Evaluation.id.desc()).limit(limit + 1)
    if deployments is not None:
        query = query.where(Evaluation.deployment.in_(deployments))
    if release is not None:
        query = query.where(Evaluation.release == release)
    if after is not None:
        query = query.where(Evaluation.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def record_result(
    session: Session, evaluation_id: str, result: GateResult, metrics: dict[str, Any]
) -> Evaluation:
    """Store what the gate decided."""
    evaluation = get_evaluation(session, evaluation_id)
    evaluation.decision = result.decision
    evaluation.reasons = list(result.reasons)
    evaluation.checks = [check.to_json() for check in result.checks]
    evaluation.metrics = metrics
    evaluation.error = None
    evaluation.finished_at = now()
    session.flush()
    return evaluation


def load_subject(session: Session, evaluation_id: str) -> Subject:
    """An evaluation's releases, as yet without rows.

    Raises `NotFound` for what is gone, `Conflict` for a release that was put away.
    """
    evaluation = get_evaluation(session, evaluation_id)
    candidate = get_release(session, evaluation.release)
    baseline = get_release(session, evaluation.baseline)
    _check_in_use(candidate)
    prompts = session.scalars(
        select(Release.system_prompt).where(
            Release.deployment == evaluation.deployment, Release.system_prompt.is_not(None)
        )
    )
    policies = session.scalar(
        select(Deployment.policies).where(Deployment.name == evaluation.deployment)
    )
    return Subject(
        candidate=candidate,
        baseline=baseline,
        rows=(),
        origin=get_release(session, f"{evaluation.deployment}@0"),
        own_prompts=frozenset(prompt for prompt in prompts if prompt),
        prepends=(policies or {}).get("system_prompt") == "prepend",
        candidate_deleted=_deleted_files(session, candidate),
        baseline_deleted=_deleted_files(session, baseline),
    )


def find_holdout_files(session: Session, evaluation_id: str, *, data: Path) -> HoldoutFiles:
    """The files of an evaluation's rows, below `data`; nothing is read yet."""
    evaluation = get_evaluation(session, evaluation_id)
    releases = (evaluation.release, evaluation.baseline)
    return HoldoutFiles(
        held=[data / file.path for file in _files(session, evaluation.dataset_id, side="holdout")],
        learned=[
            data / file.path
            for name in releases
            for file in _training_files(session, get_release(session, name))
        ],
    )


def _check_in_use(release: Release) -> None:
    if release.state in (ReleaseState.DISCARDED, ReleaseState.FAILED):
        because = f" ({release.state_reason})" if release.state_reason else ""
        raise Conflict(
            f"{release.name!r} is {release.state}{because}; evaluate another release.",
            code=f"release_{release.state}",
        )


def _newest_dataset(session: Session, deployment: str) -> str | None:
    return session.scalar(
        select(Dataset.id)
        .where(Dataset.deployment == deployment, Dataset.status == DatasetStatus.READY)
        .order_by(Dataset.id.desc())
        .limit(1)
    )


def _files(session: Session, dataset_id: str | None, *, side: str) -> list[File]:
    query = select(File).where(
        File.dataset_id == dataset_id, File.side == side, File.dialect == "trl"
    )
    return list(session.scalars(query.order_by(File.id))) if dataset_id is not None else []


def find_evaluation_on(session: Session, file_id: str) -> str | None:
    """An evaluation's job that still needs a file which one of its releases learned from, or None.

    Without the file nobody knows which rows of the holdout that release has seen.
    """
    unfinished = select(Evaluation).join(Job, Job.id == Evaluation.job_id)
    for evaluation in session.scalars(unfinished.where(Job.status.not_in(ENDED))):
        for name in (evaluation.release, evaluation.baseline):
            if file_id in _training_file_ids(session, get_release(session, name)):
                return evaluation.job_id
    return None


def _training_files(session: Session, release: Release) -> list[File]:
    """What the release's adapter learned from, or was chosen by, as far as it is still there."""
    ids = _training_file_ids(session, release)
    return list(session.scalars(select(File).where(File.id.in_(ids)))) if ids else []


def _deleted_files(session: Session, release: Release) -> tuple[str, ...]:
    there = {file.id for file in _training_files(session, release)}
    return tuple(name for name in _training_file_ids(session, release) if name not in there)


def _training_file_ids(session: Session, release: Release) -> list[str]:
    job = session.get(Job, release.job_id) if release.job_id is not None else None
    return list_files_of(job) if job is not None else []
