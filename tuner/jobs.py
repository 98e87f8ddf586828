"""Jobs: work in the background, and who may write about it.

Owns: the states of a job, its lease (`attempt` fences every write of a worker, `beat` shows that it
lives) and the sweep that finds stalled ones. Does not own what a job does (`work/handlers.py`),
what it was to make (`job_subjects.py`) or how its events are kept (`job_events.py`).

A lease involves no wall clock. An observer calls a job stalled when its beat counter hasn't moved
for `lease_seconds` of the observer's own monotonic clock, so clocks that jump or differ between
machines neither end nor extend a lease. Functions take the session first and never commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from feedback.db import new_id, now
from feedback.errors import Conflict, NotFound
from tuner.job_events import NewEvent, append_events
from tuner.job_subjects import leave_subject
from tuner.tables import Job, JobKind, JobStatus

ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class LeaseLost(Exception):
    """Another worker holds the job, or it has ended: nothing more may be written about it."""


class JobFailed(Exception):
    """The job can't be done; `code` is stable, `message` for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class StopRequest(StrEnum):
    """What somebody asked a running job's worker for."""

    CANCEL = "cancel"
    PAUSE = "pause"


def create_job(
    session: Session,
    kind: JobKind,
    *,
    spec: dict[str, Any],
    method: str | None = None,
    deployment: str | None = None,
    person_id: str | None = None,
    created_by: str | None = None,
) -> Job:
    """Queue a job; `spec` is what was asked for, in the words of the kind's handler."""
    job = Job(
        id=new_id("ftjob-" if kind == JobKind.TUNE else "job_"),
        kind=kind,
        spec=spec,
        method=method,
        deployment=deployment,
        person_id=person_id,
        created_by=created_by,
    )
    session.add(job)
    session.flush()
    append_events(session, job.id, 0, [NewEvent("Job created and queued.")])
    return job


def find_job(session: Session, job_id: str) -> Job | None:
    """The job, or None."""
    return session.get(Job, job_id)


def get_job(session: Session, job_id: str) -> Job:
    """The job; raises `NotFound`."""
    job = find_job(session, job_id)
    if job is None:
        raise NotFound(f"No job {job_id!r}; the list of jobs names those that exist.")
    return job


def count_unfinished(session: Session, person_id: str) -> int:
    """How many jobs of this person wait, run or are paused."""
    unfinished = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED)
    query = select(func.count()).where(Job.person_id == person_id, Job.status.in_(unfinished))
    return session.scalar(query) or 0


def list_jobs(
    session: Session,
    *,
    kind: str | None = None,
    deployments: Collection[str] | None = None,
    person_id: str | None = None,
    status: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Job], bool]:
    """A page of jobs, newest first, and whether more follow.

    `after` is the last id of the page before. `deployments` None means all of them.
    """
    query = select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    if kind is not None:
        query = query.where(Job.kind == kind)
    if deployments is not None:
        query = query.where(Job.deployment.in_(deployments))
    if person_id is not None:
        query = query.where(Job.person_id == person_id)
    if status is not None:
        query = query.where(Job.status == status)
    if after is not None:
        last = get_job(session, after)
        query = query.where(
            (Job.created_at < last.created_at)
            | ((Job.created_at == last.created_at) & (Job.id < last.id))
        )
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def has_queued(session: Session, kinds: Collection[str]) -> bool:
    """True when a job of one of `kinds` waits. Cheap: asked before the write lock is taken."""
    return (
        session.scalar(
            select(Job.id).where(Job.status == JobStatus.QUEUED, Job.kind.in_(kinds)).limit(1)
        )
        is not None
    )


def claim_job(session: Session, worker: str, *, kinds: Collection[str]) -> Job | None:
    """Take the oldest queued job of `kinds` for `worker` and raise its attempt.

    None when none waits. Rows that another worker is claiming at this moment are passed over
    (PostgreSQL); on SQLite the write lock of the transaction keeps the others out.
    """
    job = session.scalar(
        select(Job)
        .where(Job.status == JobStatus.QUEUED, Job.kind.in_(kinds))
        .order_by(Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    job.status = JobStatus.RUNNING
    job.worker = worker
    job.attempt += 1
    job.beat += 1
    job.started_at = job.started_at or now()
    session.flush()
    append_events(session, job.id, job.attempt, [NewEvent("Job started.")])
    return job


def beat(session: Session, job: Job) -> StopRequest | None:
    """Show that the worker lives; what somebody asked it for, or None.

    A cancellation counts before a pause. Raises `LeaseLost`.
    """
    found = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.attempt == job.attempt, Job.status == JobStatus.RUNNING)
        .values(beat=Job.beat + 1)
        .returning(Job.cancel_requested, Job.pause_requested)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if found is None:
        raise LeaseLost(f"attempt {job.attempt} no longer holds job {job.id}")
    if found.cancel_requested:
        return StopRequest.CANCEL
    return StopRequest.PAUSE if found.pause_requested else None


def record_events(session: Session, job: Job, events: Sequence[NewEvent]) -> None:
    """Append `events` in order, for the lease's holder. Raises `LeaseLost`."""
    beat(session, job)
    append_events(session, job.id, job.attempt, events)


def finish(session: Session, job: Job, result: dict[str, Any]) -> None:
    """The job succeeded; `result` is what came of it. Raises `LeaseLost`."""
    _end(session, job, NewEvent("Job succeeded."), status=JobStatus.SUCCEEDED, result=result)


def fail(session: Session, job: Job, code: str, message: str) -> None:
    """The job ended with a reason and isn't tried again. Raises `LeaseLost`."""
    _end(
        session,
        job,
        NewEvent(f"Job failed: {message}", level="error", data={"code": code}),
        status=JobStatus.FAILED,
        error_code=code,
        error_message=message,
    )
    leave_subject(session, job, message)


def cancel(session: Session, job: Job) -> None:
    """The worker ended the job because somebody asked for it. Raises `LeaseLost`."""
    _end(session, job, NewEvent("Job cancelled."), status=JobStatus.CANCELLED)
    leave_subject(session, job, "cancelled")


def pause(session: Session, job: Job) -> None:
    """The worker put the job aside because somebody asked for it. Raises `LeaseLost`."""
    _fenced_update(session, job, status=JobStatus.PAUSED, worker=None, pause_requested=False)
    append_events(session, job.id, job.attempt, [NewEvent("Job paused.")])


def give_back(session: Session, job: Job) -> None:
    """Queue the job again because its worker is shutting down. Raises `LeaseLost`."""
    _fenced_update(session, job, status=JobStatus.QUEUED, worker=None)
    append_events(
        session, job.id, job.attempt, [NewEvent("The worker is shutting down; job queued again.")]
    )


def request_cancel(session: Session, job_id: str) -> Job:
    """Cancel a queued or paused job at once; ask the worker of a running one to end it.

    Raises `NotFound`, and `Conflict` when the job has ended.
    """
    job = _lock_unfinished(session, job_id, "cancelled")
    if job.status in (JobStatus.QUEUED, JobStatus.PAUSED):
        job.status = JobStatus.CANCELLED
        job.finished_at = now()
        event = NewEvent("Job cancelled.")
        leave_subject(session, job, "cancelled")
    else:
        event = NewEvent("Cancellation requested.")
    job.cancel_requested = True
    session.flush()
    append_events(session, job.id, job.attempt, [event])
    return job


def request_pause(session: Session, job_id: str) -> Job:
    """Put a queued job aside at once; ask the worker of a running one to.

    Asked again, it changes nothing. Raises `NotFound`, and `Conflict` when the job has ended.
    """
    job = _lock_unfinished(session, job_id, "paused")
    if job.status == JobStatus.PAUSED or job.pause_requested:
        return job
    if job.status == JobStatus.QUEUED:
        job.status = JobStatus.PAUSED
        event = NewEvent("Job paused.")
    else:
        job.pause_requested = True
        event = NewEvent("Pause requested.")
    session.flush()
    append_events(session, job.id, job.attempt, [event])
    return job


def resume(session: Session, job_id: str) -> Job:
    """Queue a paused job again. Raises `NotFound`, and `Conflict` when it isn't paused."""
    job = _lock_unfinished(session, job_id, "resumed")
    if job.status != JobStatus.PAUSED:
        soon = " A pause was requested: try again once it is paused." if job.pause_requested else ""
        raise Conflict(
            f"Job {job_id!r} is {job.status}; only a paused job can be resumed.{soon}",
            code="job_not_paused",
        )
    job.status = JobStatus.QUEUED
    session.flush()
    append_events(session, job.id, job.attempt, [NewEvent("Job resumed: queued again.")])
    return job


class StalledJobs:
    """Finds running jobs whose worker is gone.

    One per observer: it remembers what it saw, and when by its own clock.
    """

    def __init__(
        self,
        *,
        lease_seconds: float,
        max_attempts: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._monotonic = monotonic
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def find(self, session: Session) -> list[Job]:
        """Running jobs whose (attempt, beat) stood still for a whole lease. Reads only."""
        at = self._monotonic()
        running = session.scalars(select(Job).where(Job.status == JobStatus.RUNNING)).all()
        seen = {}
        for job in running:
            counters = (job.attempt, job.beat)
            before = self._seen.get(job.id)
            seen[job.id] = before if before and before[0] == counters else (counters, at)
        self._seen = seen
        return [job for job in running if at - seen[job.id][1] >= self._lease_seconds]

    def take_back(self, session: Session, stalled: Job) -> Job | None:
        """Queue a job that `find` returned again; the returned row says what became of it.

        It ends as `cancelled` or becomes `paused` when that was asked for, and fails with code
        `stalled` after `max_attempts` stalls. None when its worker has shown itself meanwhile.
        """
        job = session.scalar(
            select(Job)
            .where(
                Job.id == stalled.id,
                Job.status == JobStatus.RUNNING,
                Job.attempt == stalled.attempt,
                Job.beat == stalled.beat,
            )
            .with_for_update()
        )
        if job is None:
            return None
        stalls = int(job.result.get("stalls", 0)) + 1
        job.result = {**job.result, "stalls": stalls}
        found = f"Worker {job.worker!r} was silent for {self._lease_seconds:g} s"
        if job.cancel_requested:
            job.status = JobStatus.CANCELLED
            event = NewEvent(f"{found}; job cancelled.")
        elif job.pause_requested:
            job.status, job.pause_requested = JobStatus.PAUSED, False
            event = NewEvent(f"{found}; job paused.")
        elif stalls >= self._max_attempts:
            job.status = JobStatus.FAILED
            job.error_code = "stalled"
            job.error_message = (
                f"{found}, {stalls} times in all; see the worker's log, then create the job again."
            )
            event = NewEvent(
                f"Job failed: {job.error_message}", level="error", data={"code": "stalled"}
            )
        else:
            job.status = JobStatus.QUEUED
            event = NewEvent(
                f"{found}; job queued again ({stalls} of {self._max_attempts}).", level="warn"
            )
        job.worker = None
        if job.status in ENDED:
            job.finished_at = now()
            leave_subject(session, job, job.error_message or "cancelled")
        session.flush()
        append_events(session, job.id, job.attempt, [event])
        return job


def _lock_unfinished(session: Session, job_id: str, what: str) -> Job:
    """The job, held until the transaction ends. Raises `NotFound`, and `Conflict` when it ended."""
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise NotFound(f"No job {job_id!r}; the list of jobs names those that exist.")
    if job.status in ENDED:
        raise Conflict(
            f"Job {job_id!r} has ended ({job.status}); only a queued, running or paused job can be "
            f"{what}.",
            code="job_ended",
        )
    return job


def _end(session: Session, job: Job, event: NewEvent, **values: Any) -> None:
    _fenced_update(session, job, finished_at=now(), **values)
    append_events(session, job.id, job.attempt, [event])


def _fenced_update(session: Session, job: Job, **values: Any) -> None:
    changed = session.execute(
        update(Job)
        .where(Job.id == job.id, Job.attempt == job.attempt, Job.status == JobStatus.RUNNING)
        .values(**values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    if changed is None:
        raise LeaseLost(f"attempt {job.attempt} no longer holds job {job.id}")
