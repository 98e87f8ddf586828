"""What a job was to make: it doesn't wait for ever when the job ends without having made it.

Owns: the row that a kind of job fills, and its final state where nothing came of it. A kind that
fills no row has none here. Functions take the session first and never commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from sqlalchemy import update
from sqlalchemy.orm import Session

from feedback.db import now
from feedback.tables import Dataset, DatasetStatus
from tuner.tables import Evaluation, Job, JobKind


def leave_subject(session: Session, job: Job, reason: str) -> None:
    """Put what an unsuccessful job was to make into a final state, with the reason."""
    leave = _LEAVE.get(job.kind)
    if leave is not None:
        leave(session, job, reason)


def _leave_dataset(session: Session, job: Job, reason: str) -> None:
    session.execute(
        update(Dataset)
        .where(Dataset.id == job.spec.get("dataset_id"), Dataset.status != DatasetStatus.READY)
        .values(status=DatasetStatus.FAILED, error=reason)
    )


def _leave_evaluation(session: Session, job: Job, reason: str) -> None:
    session.execute(
        update(Evaluation)
        .where(Evaluation.id == job.spec.get("evaluation_id"), Evaluation.decision.is_(None))
        .values(error=reason, finished_at=now())
    )


_LEAVE: Final[Mapping[str, Callable[[Session, Job, str], None]]] = {
    JobKind.FREEZE: _leave_dataset,
    JobKind.EVALUATE: _leave_evaluation,
}
