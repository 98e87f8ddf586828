"""The worker: its lanes, what it takes over, what it tidies, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from feedback.curation.policy import Policy
from feedback.datasets import create_dataset
from feedback.db import Database
from feedback.judgements import NewJudgement, judge
from feedback.tables import Dataset, DatasetStatus
from tests.feedback.record import ask, make_viewer
from tests.tuner.records import make_adapter
from tests.tuner.work.home import Home, make_home, names_below
from tuner import job_events, jobs
from tuner.adapters import AdapterStore
from tuner.deployments import get_deployment
from tuner.evaluation.general import read_passages
from tuner.tables import Evaluation, JobKind, JobStatus
from tuner.tuning import create_freeze_job, create_tuning_job
from tuner.work.remains import trainer_place
from tuner.work.worker import Worker


def test_corrections_become_an_evaluated_candidate(database: Database, tmp_path: Path) -> None:
    home = make_home(database, tmp_path)
    with database.write() as session:
        viewer = make_viewer(session, "ann")
        for number in range(24):
            answer = ask(session, viewer, f"What is number {number}?", f"It is {number} indeed.")
            better = NewJudgement(kind="correction", value=f"{number}.", completion_id=answer)
            judge(session, viewer, better)
        dataset = create_dataset(session, "assistant", Policy(holdout_share=0.4), created_by="ann")
        freezing = create_freeze_job(session, dataset)
    worker = home.worker()
    assert worker.run_one()
    frozen = home.job(freezing)
    assert (frozen.status, frozen.error_message) == (JobStatus.SUCCEEDED, None)
    counts = frozen.result["counts"]
    assert counts["supervised"] + counts["preference"] + counts["holdout"] == 48

    with database.write() as session:
        assert session.get_one(Dataset, dataset.id).status == DatasetStatus.READY
        tuning = create_tuning_job(
            session,
            get_deployment(session, "assistant"),
            method="dpo",
            training_file=dataset.id,
            created_by="ann",
        )
    assert worker.run_one()
    result = home.job(tuning).result
    assert (result["fine_tuned_model"], result["dataset_id"]) == ("assistant@1", dataset.id)
    assert (result["trained_tokens"], result["metrics"]) == (210, {"loss": 0.5})
    config = json.loads((tmp_path / "jobs" / tuning.id / "config.json").read_text())
    assert [Path(file).name for file in config["train_files"]] == [
        "preference.train.jsonl",
        "supervised.train.jsonl",
    ]
    assert config["data_hash"] == frozen.result["content_hash"]

    def logprob(model: str, text: str) -> float:
        if text in (*read_passages(), home.gateway.text):
            return -2.0  # what nobody taught is not forgotten
        return -1.0 if ("@" in model) == text.removesuffix(".").isdigit() else -4.0

    home.gateway.logprob = logprob
    assert worker.run_one()
    assert not worker.run_one()
    with database.read() as session:
        evaluation = session.get_one(Evaluation, result["evaluation_id"])
        assert (evaluation.decision, evaluation.baseline) == ("pass", "assistant@0")
        job = jobs.get_job(session, str(evaluation.job_id))
        assert job.result["decision"] == "pass"
    said = home.events(job)
    assert "Loading the candidate: 0 of 1." in said
    assert any(message.startswith("Scoring the holdout: 0 of ") for message in said)
    assert any("'assistant@1' against 'assistant@0': pass." in message for message in said)


def test_a_data_set_and_an_evaluation_are_made_while_a_training_goes_on(home: Home) -> None:
    training = home.tune()
    thread = threading.Thread(target=home.worker("wait").run)
    thread.start()
    try:
        home.begun(training)
        with home.database.write() as session:
            freezing = create_freeze_job(
                session, create_dataset(session, "assistant", Policy(), created_by=None)
            )
        _, evaluating = home.evaluate()
        home.until(lambda: home.job(freezing).status == JobStatus.SUCCEEDED)
        home.until(lambda: home.job(evaluating).status == JobStatus.SUCCEEDED)
        assert home.job(training).status == JobStatus.RUNNING
    finally:
        home.stopping.set()
        thread.join(20)
    assert not thread.is_alive()
    assert home.job(training).status == JobStatus.QUEUED


def test_there_are_never_two_trainers_on_one_data_directory(home: Home) -> None:
    """Neither of one worker nor of two; the second takes what is short."""
    first, second = home.tune(), home.tune()
    threads = [threading.Thread(target=home.worker("wait").run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        home.begun(first)
        _, evaluating = home.evaluate()
        home.until(lambda: home.job(evaluating).status == JobStatus.SUCCEEDED)
        assert home.job(second).status == JobStatus.QUEUED
        with home.database.write() as session:
            jobs.request_cancel(session, first.id)
        home.begun(second)
        assert home.job(first).status == JobStatus.CANCELLED
    finally:
        home.stopping.set()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_a_trainer_keeps_its_place_when_its_worker_is_killed(home: Home) -> None:
    with trainer_place(home.data) as place:
        assert place is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=(place,))
    try:
        home.tune()
        assert not home.worker().run_one()
    finally:
        child.kill()
        child.communicate()
    assert home.worker().run_one()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_lane_that_ends_takes_the_worker_with_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the supervisor starts all of it again."""
    worker = home.worker()

    def give_up(kinds: list[str]) -> bool:
        if JobKind.TUNE in kinds:
            raise SystemExit
        return False

    monkeypatch.setattr(worker, "run_one", give_up)
    worker.run()
    assert home.stopping.is_set()


def test_a_paused_job_keeps_its_checkpoints_until_it_is_cancelled(home: Home) -> None:
    jobs_left = {"paused": home.tune(), "queued": home.tune(), "cancelled": home.tune()}
    with home.database.write() as session:
        jobs.request_pause(session, jobs_left["paused"].id)
        jobs.request_cancel(session, jobs_left["cancelled"].id)
    for job in jobs_left.values():
        (home.data / "jobs" / job.id / "checkpoints" / "step-1").mkdir(parents=True)
    home.worker().sweep()  # in which leases wait: it removes nothing
    assert names_below(home.data / "jobs" / jobs_left["cancelled"].id) == {"checkpoints"}
    home.worker().tidy()
    left = {name: names_below(home.data / "jobs" / job.id) for name, job in jobs_left.items()}
    assert left == {"paused": {"checkpoints"}, "queued": {"checkpoints"}, "cancelled": set()}
    with home.database.write() as session:
        jobs.request_cancel(session, jobs_left["paused"].id)
    home.worker().tidy()
    assert names_below(home.data / "jobs" / jobs_left["paused"].id) == set()


def test_what_a_crash_left_goes_when_a_worker_starts_and_nothing_else(home: Home) -> None:
    store = AdapterStore(home.data / "adapters")
    wanted, orphan, fresh = (f"{digit}" * 64 for digit in "abc")
    with home.database.write() as session:
        make_adapter(session, base_revision=home.base.revision, content_hash=wanted)
        writing = create_dataset(session, "assistant", Policy(), created_by=None)
        create_freeze_job(session, writing)
    for name in (wanted, orphan, fresh, ".incoming-1", ".incoming-2"):
        (store.root / name).mkdir(parents=True)
    for name in (wanted, orphan, ".incoming-1"):
        os.utime(store.root / name, (0, 0))
    for name in (f"{writing.id}.x.partial", "ds_gone.x.partial", "ds_ready"):
        (home.data / "datasets" / name).mkdir(parents=True)
    home.stopping.set()
    worker = home.worker()
    worker.run()
    worker.tidy()
    assert names_below(store.root) == {wanted, fresh, ".incoming-2"}
    assert names_below(home.data / "datasets") == {f"{writing.id}.x.partial", "ds_ready"}


def test_an_unexpected_error_fails_the_job_and_not_the_worker(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, job = home.evaluate()

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("what somebody wrote")

    monkeypatch.setattr("tuner.work.evaluate.run_evaluation", broken)
    assert home.worker().run_one()
    assert home.job(job).error_code == "internal_error"
    message = str(home.job(job).error_message)
    assert message.startswith("KeyError at test_worker.py:")
    # Neither the job nor the log repeats an error's own words; the log has the way to it.
    log = "".join(str(vars(record)) for record in caplog.records)
    assert "in run_one" not in message
    assert "in broken" in log
    assert "what somebody wrote" not in message + log


def test_another_workers_stalled_job_is_taken_over(home: Home) -> None:
    _, job = home.evaluate()
    with home.database.write() as session:
        assert jobs.claim_job(session, "gone", kinds=["evaluate"]) is not None
    at = [0.0]
    worker = Worker(home.database, home.options(), home.gateway.client(), monotonic=lambda: at[0])
    worker.sweep()
    at[0] = 30.0
    worker.sweep()
    assert worker.run_one()
    found = home.job(job)
    assert (found.status, found.attempt) == (JobStatus.SUCCEEDED, 2)


def test_a_job_whose_database_went_away_is_taken_up_again(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, job = home.evaluate()
    at = [0.0]
    worker = Worker(home.database, home.options(), home.gateway.client(), monotonic=lambda: at[0])

    def away(*_: Any, **__: Any) -> Any:
        raise OperationalError("SELECT 1", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as patch:
        patch.setattr("tuner.work.evaluate.load_subject", away)
        assert worker.run_one()
    assert home.job(job).status == JobStatus.RUNNING
    worker.sweep()
    for at[0] in (10.0, 40.0):
        worker.sweep()
    assert worker.run_one()
    assert (home.job(job).status, home.job(job).attempt) == (JobStatus.SUCCEEDED, 2)


PROCESS = """
import json, sys
from pathlib import Path
from tuner.work.workbench import WorkerOptions
from tuner.work.worker import run_worker
options = json.loads(sys.argv[1])
for name in ("data", "model_dir"):
    options[name] = Path(options[name])
run_worker(WorkerOptions(**options))
"""


@pytest.mark.processes
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_told_to_stop_gives_its_job_back_and_ends_its_child(
    home: Home, sent: signal.Signals
) -> None:
    job = home.tune()
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(home.options("wait")).items()
    }
    process = subprocess.Popen([sys.executable, "-c", PROCESS, json.dumps(options)])
    try:
        home.begun(job)
        with home.database.read() as session:
            events, _ = job_events.list_events(session, job.id, limit=100)
        (child,) = [event.data["pid"] for event in events if "pid" in event.data]
        process.send_signal(sent)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert home.job(job).status == JobStatus.QUEUED
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.processes
def test_the_job_of_a_killed_worker_goes_on_and_never_beside_the_old_trainer(home: Home) -> None:
    job = home.tune()
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(home.options("wait")).items()
    }
    process = subprocess.Popen([sys.executable, "-c", PROCESS, json.dumps(options)])
    try:
        home.begun(job)
    finally:
        process.kill()
        process.wait()
    with home.database.read() as session:
        events, _ = job_events.list_events(session, job.id, limit=100)
    (child,) = [event.data["pid"] for event in events if "pid" in event.data]
    worker = home.worker(lease_seconds=0.2)
    try:
        home.until(lambda: worker.sweep() or home.job(job).status == JobStatus.QUEUED)
        # The trainer of these tests outlives its worker, which the real one doesn't.
        assert not worker.run_one()
    finally:
        os.kill(child, signal.SIGKILL)
    home.until(worker.run_one)
    found = home.job(job)
    assert (found.status, found.attempt) == (JobStatus.SUCCEEDED, 2)
