"""What happened in a job, in order: its events, and the checkpoints among them.

Owns: their numbering and their pages. Does not own who may write about a job (`jobs.py`) or the
words (`work/journal.py`). Functions take the session first and never commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.db import new_id
from feedback.errors import NotFound
from tuner.tables import JobEvent


@dataclass(frozen=True, slots=True)
class NewEvent:
    """Something to tell about a job.

    `type` is `metrics` when `data` holds figures of a step, `validation` when it holds those of the
    validation rows, `checkpoint` when one was written.
    """

    message: str
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics", "validation", "checkpoint"] = "message"
    data: dict[str, Any] = field(default_factory=dict)


def append_events(session: Session, job_id: str, attempt: int, events: Sequence[NewEvent]) -> None:
    """Number and insert events.

    The caller's transaction holds the job's row, so numbers don't collide.
    """
    last = session.scalar(select(func.max(JobEvent.seq)).where(JobEvent.job_id == job_id)) or 0
    for seq, event in enumerate(events, last + 1):
        session.add(
            JobEvent(
                id=new_id("ftevt-"),
                job_id=job_id,
                seq=seq,
                attempt=attempt,
                level=event.level,
                type=event.type,
                message=event.message,
                data=event.data,
            )
        )
    session.flush()


def list_events(
    session: Session,
    job_id: str,
    *,
    after: str | None = None,
    limit: int = 20,
    newest_first: bool = True,
) -> tuple[list[JobEvent], bool]:
    """A page of a job's events and whether more follow.

    `after` is the last event's id of the page before. Newest first is the order of OpenAI's API;
    oldest first suits somebody who watches.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id).limit(limit + 1)
    query = query.order_by(JobEvent.seq.desc() if newest_first else JobEvent.seq)
    if after is not None:
        last = session.scalar(
            select(JobEvent.seq).where(JobEvent.id == after, JobEvent.job_id == job_id)
        )
        if last is None:
            raise NotFound(f"Job {job_id!r} has no event {after!r}.", param="after")
        query = query.where(JobEvent.seq < last if newest_first else JobEvent.seq > last)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def list_checkpoints(
    session: Session, job_id: str, *, after: str | None = None, limit: int = 10
) -> tuple[list[tuple[JobEvent, dict[str, Any]]], bool]:
    """A page of the checkpoints that a job told of, newest first, and whether more follow.

    Each with the figures of its step, as far as they were told: `loss` of the training, and
    `full_valid_loss` of all validation rows. A step that was done again after a crash or a pause
    counts once. `after` is the last event's id of the page before.
    """
    told = session.scalars(
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.type != "message")
        .order_by(JobEvent.seq)
    )
    figures: dict[Any, dict[str, Any]] = {}
    found: dict[Any, JobEvent] = {}
    for event in told:
        step = event.data.get("step")
        if event.type == "checkpoint":
            found[step] = event
        else:
            name = "loss" if event.type == "metrics" else "full_valid_loss"
            figures.setdefault(step, {})[name] = event.data.get(name)
    newest = sorted(found.values(), key=lambda event: event.seq, reverse=True)
    if after is not None:
        last = next((event.seq for event in newest if event.id == after), None)
        if last is None:
            raise NotFound(f"Job {job_id!r} has no checkpoint {after!r}.", param="after")
        newest = [event for event in newest if event.seq < last]
    page = [(event, figures.get(event.data.get("step"), {})) for event in newest[:limit]]
    return page, len(newest) > limit
