"""States of a job: who may write about it, and what becomes of it when its worker is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.db import Database
from feedback.errors import Conflict, NotFound
from feedback.tables import Dataset, DatasetStatus
from tests.tuner.records import add_dataset, make_candidate, make_deployment
from tuner import job_events, jobs
from tuner.evaluation.evaluations import create_evaluation
from tuner.job_events import NewEvent
from tuner.jobs import LeaseLost, StalledJobs, StopRequest
from tuner.tables import Evaluation, Job, JobKind, JobStatus
from tuner.tuning import create_freeze_job

KINDS = (JobKind.FREEZE, JobKind.TUNE, JobKind.EVALUATE)


def queue(database: Database, kind: JobKind = JobKind.TUNE) -> Job:
    with database.write() as session:
        return jobs.create_job(session, kind, spec={"seed": 1})


def claim(database: Database, worker: str = "one") -> Job:
    with database.write() as session:
        job = jobs.claim_job(session, worker, kinds=KINDS)
    assert job is not None
    return job


def read(database: Database, job: Job) -> Job:
    with database.read() as session:
        return jobs.get_job(session, job.id)


def messages(database: Database, job: Job) -> list[str]:
    with database.read() as session:
        events, _ = job_events.list_events(session, job.id, newest_first=False, limit=100)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        return [event.message for event in events]


class Clock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_oldest_job_of_a_known_kind_is_claimed_once(database: Database) -> None:
    queue(database, JobKind.EXPORT)
    first, second = queue(database), queue(database, JobKind.EVALUATE)
    assert [claim(database).id, claim(database).id] == [first.id, second.id]
    with database.write() as session:
        assert not jobs.has_queued(session, KINDS)
        assert jobs.claim_job(session, "one", kinds=KINDS) is None
    found = read(database, first)
    assert (found.status, found.worker, found.attempt) == (JobStatus.RUNNING, "one", 1)
    assert found.started_at is not None


def test_a_job_that_is_being_claimed_is_passed_over(postgres_database: Database) -> None:
    first, second = queue(postgres_database), queue(postgres_database)
    with postgres_database.write() as one, postgres_database.write() as other:
        claimed = [jobs.claim_job(session, "w", kinds=KINDS) for session in (one, other)]
    assert {job.id for job in claimed if job} == {first.id, second.id}


def test_tuning_jobs_are_named_as_openai_names_them(sqlite_database: Database) -> None:
    assert queue(sqlite_database, JobKind.TUNE).id.startswith("ftjob-")
    assert queue(sqlite_database, JobKind.EVALUATE).id.startswith("job_")


def test_an_earlier_attempt_writes_nothing(database: Database) -> None:
    queue(database)
    stale = claim(database)
    with database.write() as session:
        jobs.give_back(session, stale)
    current = claim(database, "two")
    told = messages(database, current)
    for write in (
        lambda session: jobs.beat(session, stale),
        lambda session: jobs.record_events(session, stale, [NewEvent("late")]),
        lambda session: jobs.finish(session, stale, {"late": True}),
        lambda session: jobs.fail(session, stale, "late", "late"),
        lambda session: jobs.cancel(session, stale),
        lambda session: jobs.pause(session, stale),
        lambda session: jobs.give_back(session, stale),
    ):
        with pytest.raises(LeaseLost), database.write() as session:
            write(session)
    found = read(database, current)
    assert (found.status, found.worker, found.result) == (JobStatus.RUNNING, "two", {})
    assert messages(database, current) == told


def test_nothing_more_is_written_about_a_job_that_ended(database: Database) -> None:
    job = queue(database)
    held = claim(database)
    with database.write() as session:
        jobs.finish(session, held, {"answer": 42})
    with pytest.raises(LeaseLost), database.write() as session:
        jobs.fail(session, held, "late", "late")
    found = read(database, job)
    assert (found.status, found.result) == (JobStatus.SUCCEEDED, {"answer": 42})
    assert found.finished_at is not None


def test_events_keep_their_order_and_come_in_pages(database: Database) -> None:
    queue(database)
    job = claim(database)
    with database.write() as session:
        jobs.record_events(session, job, [NewEvent(str(number)) for number in range(3)])
    with database.read() as session:
        page, more = job_events.list_events(session, job.id, limit=2)
        assert ([event.message for event in page], more) == (["2", "1"], True)
        rest, more = job_events.list_events(session, job.id, after=page[-1].id, limit=10)
        assert rest[0].message == "0"
        assert not more
        with pytest.raises(NotFound, match="no event 'ftevt-none'"):
            job_events.list_events(session, job.id, after="ftevt-none")
    assert messages(database, job)[-3:] == ["0", "1", "2"]


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_hears_of_it(
    database: Database,
) -> None:
    running = queue(database)
    held = claim(database)
    queued = queue(database)
    with database.write() as session:
        assert jobs.request_cancel(session, queued.id).status == JobStatus.CANCELLED
        assert jobs.request_cancel(session, running.id).status == JobStatus.RUNNING
    with database.write() as session:
        assert jobs.beat(session, held)
        jobs.cancel(session, held)
    assert read(database, running).status == JobStatus.CANCELLED
    with database.write() as session:
        with pytest.raises(Conflict, match=r"has ended \(cancelled\)"):
            jobs.request_cancel(session, running.id)
        with pytest.raises(NotFound):
            jobs.request_cancel(session, "ftjob-none")


def test_jobs_are_listed_newest_first_in_pages(database: Database) -> None:
    made = [queue(database).id for _ in range(3)]
    with database.read() as session:
        page, more = jobs.list_jobs(session, kind=JobKind.TUNE, limit=2)
        assert (sorted(job.id for job in page), more) == (sorted(made[1:]), True)
        rest, more = jobs.list_jobs(session, after=page[-1].id)
        assert ([job.id for job in rest], more) == ([made[0]], False)
        assert jobs.list_jobs(session, deployments=["other"]) == ([], False)
        assert jobs.list_jobs(session, status=JobStatus.RUNNING) == ([], False)


def test_a_job_stalls_when_its_beat_stands_still_for_a_lease(database: Database) -> None:
    queue(database)
    job = claim(database)
    clock = Clock()
    observer = StalledJobs(lease_seconds=30, max_attempts=3, monotonic=clock)

    def find() -> list[str]:
        with database.read() as session:
            return [found.id for found in observer.find(session)]

    assert find() == []  # however long it stood before this observer came
    clock.now = 29.9
    assert find() == []
    with database.write() as session:
        jobs.beat(session, job)
    clock.now = 31.0
    assert find() == []  # it has moved; a new lease begins
    clock.now = 60.9
    assert find() == []
    clock.now = 61.0
    assert find() == [job.id]


def take_back(database: Database, *, max_attempts: int = 3, beat_between: bool = False) -> Job:
    """Let the running job stall, and take it back."""
    clock = Clock()
    observer = StalledJobs(lease_seconds=30, max_attempts=max_attempts, monotonic=clock)
    with database.read() as session:
        observer.find(session)
    clock.now = 30.0
    with database.read() as session:
        (stalled,) = observer.find(session)
    if beat_between:
        with database.write() as session:
            jobs.beat(session, stalled)
    with database.write() as session:
        return observer.take_back(session, stalled) or stalled


def test_a_stalled_job_is_queued_again_and_fails_in_the_end(database: Database) -> None:
    queue(database)
    for attempt in (1, 2):
        job = claim(database)
        assert job.attempt == attempt
        found = take_back(database)
        assert (found.status, found.worker) == (JobStatus.QUEUED, None)
        with pytest.raises(LeaseLost), database.write() as session:
            jobs.beat(session, job)
    claim(database)
    found = read(database, take_back(database))
    assert (found.status, found.error_code) == (JobStatus.FAILED, "stalled")
    assert "3 times in all" in str(found.error_message)
    assert found.finished_at is not None


def test_a_worker_that_shows_itself_in_time_keeps_its_job(database: Database) -> None:
    queue(database)
    job = claim(database)
    take_back(database, beat_between=True)
    with database.write() as session:
        jobs.beat(session, job)
    assert read(database, job).status == JobStatus.RUNNING


def test_a_stalled_job_that_was_to_be_cancelled_is_not_begun_again(database: Database) -> None:
    queue(database)
    job = claim(database)
    with database.write() as session:
        jobs.request_cancel(session, job.id)
    assert take_back(database).status == JobStatus.CANCELLED


def test_a_queued_job_is_paused_at_once_and_a_running_one_by_its_worker(
    database: Database,
) -> None:
    running = queue(database)
    held = claim(database)
    queued = queue(database)
    with database.write() as session:
        assert jobs.request_pause(session, queued.id).status == JobStatus.PAUSED
        assert jobs.request_pause(session, running.id).status == JobStatus.RUNNING
        jobs.request_pause(session, running.id)
        with pytest.raises(Conflict, match="try again once it is paused"):
            jobs.resume(session, running.id)
        assert jobs.beat(session, held) == StopRequest.PAUSE
        jobs.pause(session, held)
    found = read(database, running)
    assert (found.status, found.worker, found.finished_at) == (JobStatus.PAUSED, None, None)
    with database.write() as session:
        assert not jobs.has_queued(session, KINDS)
        assert jobs.claim_job(session, "one", kinds=KINDS) is None
        assert jobs.request_pause(session, running.id).status == JobStatus.PAUSED
        assert jobs.resume(session, running.id).status == JobStatus.QUEUED
        with pytest.raises(Conflict, match="only a paused job can be resumed"):
            jobs.resume(session, running.id)
    again = claim(database)
    assert (again.id, again.attempt) == (running.id, 2)
    with database.write() as session:
        assert jobs.beat(session, again) is None
        jobs.finish(session, again, {})
        for ask in (jobs.request_pause, jobs.resume):
            with pytest.raises(Conflict, match=r"has ended \(succeeded\)"):
                ask(session, running.id)
    assert messages(database, running) == [
        "Job created and queued.",
        "Job started.",
        "Pause requested.",
        "Job paused.",
        "Job resumed: queued again.",
        "Job started.",
        "Job succeeded.",
    ]


def test_a_cancellation_counts_before_a_pause_and_ends_a_paused_job(database: Database) -> None:
    first = queue(database)
    held = claim(database)
    with database.write() as session:
        jobs.request_pause(session, first.id)
        jobs.request_cancel(session, first.id)
        assert jobs.beat(session, held) == StopRequest.CANCEL
        jobs.cancel(session, held)
    second = queue(database)
    with database.write() as session:
        jobs.request_pause(session, second.id)
        assert jobs.request_cancel(session, second.id).status == JobStatus.CANCELLED


def test_a_stalled_job_that_was_to_be_paused_waits_for_its_resumption(database: Database) -> None:
    queue(database)
    job = claim(database)
    with database.write() as session:
        jobs.request_pause(session, job.id)
    found = take_back(database)
    assert (found.status, found.pause_requested) == (JobStatus.PAUSED, False)
    with pytest.raises(LeaseLost), database.write() as session:
        jobs.beat(session, job)


def test_checkpoints_are_told_once_a_step_with_the_figures_of_that_step(
    database: Database,
) -> None:
    queue(database)
    job = claim(database)

    def metrics(step: int, loss: float) -> NewEvent:
        return NewEvent("", type="metrics", data={"step": step, "loss": loss})

    def checkpoint(step: int) -> NewEvent:
        return NewEvent("", type="checkpoint", data={"step": step})

    def validation(step: int, loss: float) -> NewEvent:
        return NewEvent("", type="validation", data={"step": step, "full_valid_loss": loss})

    told = [metrics(1, 3.0), metrics(2, 2.0), checkpoint(2), checkpoint(4)]
    again = [metrics(4, 1.0), validation(4, 1.5), checkpoint(4), checkpoint(6), NewEvent("done")]
    with database.write() as session:
        jobs.record_events(session, job, [*told, *again])
    with database.read() as session:
        found, more = job_events.list_checkpoints(session, job.id)
        assert [(row.data["step"], figures) for row, figures in found] == [
            (6, {}),
            (4, {"loss": 1.0, "full_valid_loss": 1.5}),
            (2, {"loss": 2.0}),
        ]
        assert not more
        first, more = job_events.list_checkpoints(session, job.id, limit=2)
        assert more
        rest, more = job_events.list_checkpoints(session, job.id, after=first[-1][0].id)
        assert ([row.data["step"] for row, _ in rest], more) == ([2], False)
        with pytest.raises(NotFound, match="no checkpoint"):
            job_events.list_checkpoints(session, job.id, after="ftevt-none")


def test_giving_back_costs_no_attempt(database: Database) -> None:
    queue(database)
    for _ in range(5):
        job = claim(database)
        with database.write() as session:
            jobs.give_back(session, job)
    assert read(database, job).status == JobStatus.QUEUED
    claim(database)
    assert take_back(database).status == JobStatus.QUEUED


def test_what_a_failed_job_was_to_make_does_not_wait_for_ever(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        make_deployment(session)
        dataset = add_dataset(session, tmp_path, status=DatasetStatus.QUEUED)
        create_freeze_job(session, dataset)
        evaluation, _ = create_evaluation(session, make_candidate(session))
    for _ in range(2):
        job = claim(database)
        with database.write() as session:
            jobs.fail(session, job, "broken", "the disk is full")
    with database.read() as session:
        found = session.get_one(Dataset, dataset.id)
        assert (found.status, found.error) == (DatasetStatus.FAILED, "the disk is full")
        ended = session.get_one(Evaluation, evaluation.id)
        assert (ended.decision, ended.error) == (None, "the disk is full")
        assert ended.finished_at is not None
