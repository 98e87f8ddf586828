"""What a running job tells, and that none of it is lost while the database is away."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from feedback.db import Database
from tuner import job_events, jobs
from tuner.job_events import NewEvent
from tuner.jobs import LeaseLost
from tuner.tables import Job, JobKind
from tuner.work.journal import Journal, Progress, to_job_events

WORDS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"event": "started", "message": "Training on 4."}, "info", "message", "Training on 4."),
    (
        {"event": "started", "examples": 4, "steps": 2},
        "info",
        "message",
        "Training on 4 examples, 2 steps.",
    ),
    (
        {"event": "step", "step": 1, "steps": 2, "loss": 0.5},
        "info",
        "metrics",
        "Step 1/2: training loss 0.5000",
    ),
    (
        {"event": "step", "step": 1, "steps": 2, "loss": None},
        "info",
        "metrics",
        "Step 1/2: training loss unknown",
    ),
    (
        {"event": "validation", "epoch": 1, "loss": 1},
        "info",
        "validation",
        "Epoch 1: validation loss 1.0000",
    ),
    ({"event": "checkpoint", "step": 20}, "info", "checkpoint", "Checkpoint at step 20."),
    ({"event": "restarted", "message": "Again."}, "warn", "message", "Again."),
    (
        {"event": "failed", "code": "kl", "message": "KL is 7"},
        "error",
        "message",
        "The trainer gave up: KL is 7",
    ),
    (
        {"event": "finished", "adapter": "/x", "message": "Done."},
        "info",
        "message",
        "Done. Checking the adapter.",
    ),
    ({"event": "references", "message": "Computing."}, "info", "message", "Computing."),
    ({"event": "of_tomorrow"}, "info", "message", "Trainer: of_tomorrow."),
]


@pytest.mark.parametrize(("event", "level", "kind", "said"), WORDS)
def test_a_trainers_event_in_words(event: dict[str, Any], level: str, kind: str, said: str) -> None:
    (found,) = to_job_events([event])
    assert (found.level, found.type, found.message) == (level, kind, said)


def test_figures_are_kept_and_long_ones_left_to_the_result() -> None:
    step = {"event": "step", "step": 1, "steps": 2, "epoch": 1, "loss": 0.5, "kl": 0.1}
    finished = {"event": "finished", "metrics": {"loss": 1}, "probe": {}, "manifest": {}}
    first, second = to_job_events([step, finished])
    assert first.data == {"step": 1, "steps": 2, "epoch": 1, "loss": 0.5, "kl": 0.1}
    assert second.data == {"metrics": {"loss": 1}}
    validation = {"event": "validation", "step": 4, "epoch": 2, "loss": 0.25, "nll": 0.25}
    (found,) = to_job_events([validation])
    assert found.data == {"step": 4, "epoch": 2, "full_valid_loss": 0.25, "nll": 0.25}


def claim(database: Database) -> Job:
    with database.write() as session:
        jobs.create_job(session, JobKind.TUNE, spec={})
        job = jobs.claim_job(session, "one", kinds=[JobKind.TUNE])
    assert job is not None
    return job


def told(database: Database, job: Job) -> list[str]:
    with database.read() as session:
        events, _ = job_events.list_events(session, job.id, newest_first=False, limit=1000)
        return [event.message for event in events][2:]


def test_events_are_written_as_they_arrive_many_at_once_too(database: Database) -> None:
    job = claim(database)
    journal = Journal(database, job)
    journal.record_trainer([{"event": "started", "tokens": 70, "message": "Go."}])
    assert told(database, job) == ["Go."]
    assert journal.epoch_tokens == 70
    journal.record([NewEvent(str(number)) for number in range(450)])
    assert told(database, job)[1:] == [str(number) for number in range(450)]


def test_events_wait_while_the_database_is_away(sqlite_database: Database) -> None:
    job = claim(sqlite_database)
    journal = Journal(sqlite_database, job)
    with sqlite_database.write() as session:
        session.execute(text("ALTER TABLE job_events RENAME TO away"))
    journal.record([NewEvent("one")])
    journal.record([NewEvent("two")])
    with sqlite_database.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO job_events"))
    with sqlite_database.write() as session:
        journal.flush(session)
    assert told(sqlite_database, job) == ["one", "two"]


def test_a_lost_lease_is_not_taken_for_a_database_that_is_away(database: Database) -> None:
    job = claim(database)
    journal = Journal(database, job)
    with database.write() as session:
        jobs.give_back(session, job)
    with pytest.raises(LeaseLost):
        journal.record([NewEvent("late")])


def test_progress_is_told_once_a_second_and_each_part_at_once(sqlite_database: Database) -> None:
    job = claim(sqlite_database)
    at, checks = [0.0], []
    progress = Progress(Journal(sqlite_database, job), lambda: checks.append(at[0]), lambda: at[0])
    for seconds, what, done in (
        (0.0, "scoring", 0),
        (0.5, "scoring", 1),
        (1.0, "scoring", 2),
        (9.0, "scoring", 2),
        (9.1, "generating", 0),
    ):
        at[0] = seconds
        progress.report(what, done, 4)
    assert told(sqlite_database, job) == [
        "Scoring: 0 of 4.",
        "Scoring: 2 of 4.",
        "Generating: 0 of 4.",
    ]
    assert len(checks) == 5
