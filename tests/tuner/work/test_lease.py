"""The lease of a running job: lost, cancelled or paused, at any moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.tuner.gateway import FakeGateway
from tests.tuner.work.home import Home, ask_to_cancel, in_thread, take_over
from tuner import job_events, jobs
from tuner.adapters import AdapterStore
from tuner.tables import Adapter, Evaluation, Job, JobStatus, Release


def test_a_lost_lease_ends_the_training_and_writes_nothing(home: Home) -> None:
    job = home.tune()
    thread = in_thread(home.worker("wait"))
    home.begun(job)
    take_over(home, job)
    told = home.events(job)
    thread.join(20)
    assert not thread.is_alive()
    found = home.job(job)
    assert (found.status, found.worker, found.result) == (JobStatus.RUNNING, "other", {})
    assert home.events(job) == told
    assert (home.count(Release), home.count(Adapter)) == (1, 0)


@pytest.mark.parametrize(
    ("happens", "status"),
    [(take_over, JobStatus.RUNNING), (ask_to_cancel, JobStatus.CANCELLED)],
    ids=["lost", "cancelled"],
)
def test_a_lease_that_ends_at_the_last_moment_writes_nothing(
    home: Home, happens: Callable[[Home, Job], None], status: JobStatus
) -> None:
    evaluation, job = home.evaluate()

    class Late(FakeGateway):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            if request.method == "DELETE":
                happens(home, job)
            return super().__call__(request)

    home.gateway = Late()
    # By itself it hears of nothing within the test's time.
    assert home.worker(poll_seconds=60.0, lease_seconds=600.0).run_one()
    assert home.job(job).status == status
    with home.database.read() as session:
        assert session.get_one(Evaluation, evaluation.id).decision is None


def test_a_running_job_is_cancelled(home: Home) -> None:
    job = home.tune()
    thread = in_thread(home.worker("wait"))
    home.begun(job)
    with home.database.write() as session:
        jobs.request_cancel(session, job.id)
    thread.join(20)
    assert not thread.is_alive()
    assert home.job(job).status == JobStatus.CANCELLED
    assert home.count(Release) == 1


def test_a_paused_job_ends_its_trainer_and_goes_on_when_it_is_resumed(home: Home) -> None:
    job = home.tune()
    thread = in_thread(home.worker("wait"))
    home.begun(job)
    with home.database.write() as session:
        jobs.request_pause(session, job.id)
        events, _ = job_events.list_events(session, job.id, limit=100)
        (child,) = [event.data["pid"] for event in events if "pid" in event.data]
    thread.join(20)
    assert not thread.is_alive()
    assert home.job(job).status == JobStatus.PAUSED
    assert not Path(f"/proc/{child}").exists()
    assert (home.data / "jobs" / job.id / "checkpoints").is_dir()
    assert not home.worker().run_one()
    with home.database.write() as session:
        jobs.resume(session, job.id)
    assert home.worker().run_one()
    found = home.job(job)
    assert (found.status, found.attempt) == (JobStatus.SUCCEEDED, 2)
    assert found.result["fine_tuned_model"] == "assistant@1"


def test_a_pause_that_comes_too_late_changes_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = home.tune()
    worker = home.worker(poll_seconds=60.0, lease_seconds=600.0)
    put = AdapterStore.put

    def put_and_ask(store: AdapterStore, folder: Path) -> str:
        with home.database.write() as session:
            jobs.request_pause(session, job.id)
        return put(store, folder)

    monkeypatch.setattr(AdapterStore, "put", put_and_ask)
    assert worker.run_one()
    assert home.job(job).status == JobStatus.SUCCEEDED
