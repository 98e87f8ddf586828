"""Tuning jobs: what reaches the trainer, the candidate, and what is left when one fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feedback import audit
from feedback.tables import File
from tests.tiny_adapters import build_tiny_adapter
from tests.tuner.records import (
    add_dataset,
    add_file,
    make_candidate,
    preference,
    supervised,
)
from tests.tuner.work.home import ROWS, Home, delete_file, in_thread, names_below
from tuner import job_events, jobs
from tuner.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from tuner.deployments import get_deployment
from tuner.moves import move_production
from tuner.tables import Adapter, Evaluation, Job, JobStatus, Release


def test_a_candidate_takes_productions_prompt_and_says_where_it_comes_from(home: Home) -> None:
    job = home.tune()
    home.worker().run_one()
    assert home.job(job).status == JobStatus.SUCCEEDED
    with home.database.read() as session:
        release = session.get_one(Release, "assistant@1")
        assert (release.system_prompt, release.sampling) == ("Be kind.", {"temperature": 0.5})
        assert (release.job_id, release.created_by, release.state) == (job.id, "ann", "candidate")
        adapter = session.get_one(Adapter, release.adapter_id)
        assert (adapter.r, adapter.lora_alpha, adapter.job_id) == (8, 16, job.id)
        assert adapter.probe is not None
        assert adapter.probe["adapter"] == [[-2.0]]
        (entry,), _ = audit.list_entries(session, subject="assistant@1")
        assert (entry.action, entry.actor, entry.details["job"]) == (
            "release_created",
            "worker",
            job.id,
        )
        assert get_deployment(session, "assistant").production == 0
    AdapterStore(home.data / "adapters").verify(adapter.content_hash)


def test_a_trainers_steps_are_the_jobs_metrics(home: Home) -> None:
    job = home.tune()
    home.worker().run_one()
    with home.database.read() as session:
        events, _ = job_events.list_events(session, job.id, newest_first=False, limit=100)
    (step,) = [event for event in events if event.type == "metrics"]
    assert step.data == {"step": 1, "steps": 2, "epoch": 1, "loss": 0.5}
    assert [event.message for event in events][1:4] == [
        "Job started.",
        "Training begins.",
        "Step 1/2: training loss 0.5000",
    ]
    assert events[-1].message == "Job succeeded."


def test_checkpoints_go_and_what_explains_the_run_stays(home: Home) -> None:
    job = home.tune()
    home.worker().run_one()
    folder = home.data / "jobs" / job.id
    assert {entry.name for entry in folder.iterdir()} == {
        "config.json",
        "manifest.json",
        "trainer.log",
    }
    assert json.loads((folder / "manifest.json").read_text())["epochs"] == 3
    assert (folder / "trainer.log").read_text() == "a line of the log\n"


def test_the_trainer_sees_no_setting_of_ours(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_WORKER__API_KEY", "secret")
    job = home.tune()
    home.worker().run_one()
    assert home.job(job).result["manifest"]["settings"] == ["BURNISH_TRAINER_PARENT"]


def test_hyperparameters_reach_the_trainer_over_its_defaults(home: Home) -> None:
    asked = {"n_epochs": 5, "learning_rate_multiplier": 0.5, "max_length": 4096}
    job = home.tune(hyperparameters=asked, seed=7)
    home.worker(max_lora_rank=8, training_threads=3).run_one()
    config = json.loads((home.data / "jobs" / job.id / "config.json").read_text())
    assert (config["epochs"], config["seed"], config["threads"]) == (5, 7, 3)
    assert config["learning_rate"] == pytest.approx(1e-4)  # half of the method's 2e-4
    assert (config["r"], config["lora_alpha"], config["max_rank"]) == (8, 16.0, 8)
    assert config["max_length"] == 512  # the base reaches no further


def test_no_example_is_longer_than_what_the_engine_reads(home: Home) -> None:
    job = home.tune()
    home.worker(max_model_len=256).run_one()
    config = json.loads((home.data / "jobs" / job.id / "config.json").read_text())
    assert config["max_length"] == 256


def test_a_suffix_and_a_validation_file_reach_release_and_trainer(home: Home) -> None:
    with home.database.write() as session:
        held = add_file(session, home.data, [supervised("v", "Valid?", "Yes.")], side=None)
    job = home.tune(suffix="short answers", validation_file=held.id)
    assert home.worker().run_one()
    config = json.loads((home.data / "jobs" / job.id / "config.json").read_text())
    assert config["validation_file"] == str((home.data / held.path).resolve())
    assert config["validation_file"] not in config["train_files"]
    with home.database.read() as session:
        release = session.get_one(Release, "assistant@1")
        assert (release.job_id, release.suffix) == (job.id, "short answers")


def test_the_same_weights_again_are_one_adapter_and_another_release(home: Home) -> None:
    first, second = home.tune(), home.tune()
    worker = home.worker()
    while worker.run_one():
        pass
    results = [home.job(job).result for job in (first, second)]
    assert [result["fine_tuned_model"] for result in results] == ["assistant@1", "assistant@2"]
    assert results[0]["adapter"] == results[1]["adapter"]
    assert home.count(Adapter) == 1


def test_production_that_moved_meanwhile_is_named_as_left_out(home: Home) -> None:
    with home.database.write() as session:
        upload = add_file(session, home.data, ROWS, kind=None, side=None)
    job = home.tune(training_file=upload.id)
    assert job.spec["sources_left_out"] == []
    with home.database.write() as session:
        learned = add_dataset(session, home.data, train=ROWS)
        make_candidate(session, dataset_id=learned.id, adapter=None)
        move_production(session, "assistant", 1, expected_generation=0)
    home.worker().run_one()
    with home.database.read() as session:
        assert session.get_one(Release, "assistant@2").sources_left_out == [learned.id]


def damage_file(home: Home, job: Job) -> None:
    with home.database.read() as session:
        (home.data / session.get_one(File, job.spec["files"][0]).path).write_text("{}\n")


def lose_file(home: Home, job: Job) -> None:
    with home.database.read() as session:
        (home.data / session.get_one(File, job.spec["files"][0]).path).unlink()


def other_base(home: Home, _job: Job) -> None:
    with home.database.write() as session:
        session.get_one(Release, "assistant@0").base_revision = "another"


def other_template(home: Home, _job: Job) -> None:
    with home.database.write() as session:
        session.get_one(Release, "assistant@0").template_hash = "another"


def no_base(home: Home, _job: Job) -> None:
    (home.base.path / "config.json").unlink()


def cut_adapter(home: Home, _job: Job) -> None:
    os.truncate(home.made / WEIGHTS_FILE, 1000)


def reshape_adapter(home: Home, _job: Job) -> None:
    config = home.base.path / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "hidden_size": 64}))
    kept = (home.made / CONFIG_FILE).read_bytes()
    build_tiny_adapter(home.base.path, home.made, seed=1)
    (home.made / CONFIG_FILE).write_bytes(kept)
    config.write_text(before)


def leave_more(home: Home, _job: Job) -> None:
    (home.made / "README.md").write_text("made by")


def damage_validation_file(home: Home, job: Job) -> None:
    with home.database.read() as session:
        (home.data / session.get_one(File, job.spec["validation_file"]).path).write_text("{}\n")


def delete_validation_file(home: Home, job: Job) -> None:
    with home.database.write() as session:
        session.delete(session.get_one(File, job.spec["validation_file"]))


@pytest.mark.parametrize(
    ("change", "mode", "code"),
    [
        (damage_file, "good", "training_data_damaged"),
        (lose_file, "good", "training_data_missing"),
        (delete_file, "good", "training_data_gone"),
        (damage_validation_file, "good", "training_data_damaged"),
        (delete_validation_file, "good", "validation_data_gone"),
        (other_base, "good", "wrong_base"),
        (other_template, "good", "wrong_template"),
        (no_base, "good", "base_unfit"),
        (cut_adapter, "good", "truncated"),
        (reshape_adapter, "good", "wrong_shape"),
        (leave_more, "good", "extra_file"),
        (lambda *_: None, "guard", "kl_too_large"),
    ],
)
def test_a_job_that_fails_leaves_a_reason_and_no_candidate(
    home: Home, change: Callable[[Home, Job], None], mode: str, code: str
) -> None:
    with home.database.write() as session:
        held = add_file(session, home.data, [supervised("v", "Valid?", "Yes.")], side=None)
    job = home.tune(validation_file=held.id)
    change(home, job)
    assert home.worker(mode).run_one()
    found = home.job(job)
    assert (found.status, found.error_code) == (JobStatus.FAILED, code)
    assert found.error_message
    assert home.events(job)[-1] == f"Job failed: {found.error_message}"
    assert (home.count(Release), home.count(Adapter), home.count(Evaluation)) == (1, 0, 0)


def test_data_deleted_while_it_is_trained_on_makes_no_candidate(home: Home) -> None:
    job = home.tune()
    worker = home.worker()
    create = AdapterStore.put

    def put(store: AdapterStore, folder: Path) -> str:
        delete_file(home, job)
        return create(store, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterStore, "put", put)
        worker.run_one()
    assert home.job(job).error_code == "training_data_gone"
    assert (home.count(Release), home.count(Adapter)) == (1, 0)


@pytest.mark.parametrize("mode", ["guard", "cancel"])
def test_what_ends_badly_leaves_what_explains_it_and_no_weights(home: Home, mode: str) -> None:
    job = home.tune()
    thread = in_thread(home.worker("guard" if mode == "guard" else "wait"))
    if mode == "cancel":
        home.begun(job)
        with home.database.write() as session:
            jobs.request_cancel(session, job.id)
    thread.join(20)
    assert home.job(job).status in (JobStatus.FAILED, JobStatus.CANCELLED)
    assert names_below(home.data / "jobs" / job.id) == {"config.json", "trainer.log"}


def test_an_adapter_whose_release_could_not_be_made_is_removed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = home.tune()

    def refuse(*_: Any, **__: Any) -> None:
        raise jobs.JobFailed("training_data_gone", "It was deleted.")

    monkeypatch.setattr("tuner.work.tune.create_candidate", refuse)
    assert home.worker().run_one()
    assert home.job(job).error_code == "training_data_gone"
    assert names_below(home.data / "adapters") == set()


def test_pairs_train_by_dpo_with_corrections_beside_them(home: Home) -> None:
    with home.database.write() as session:
        pairs = [preference("ex_p", "Which?", "This one.", "None of them.")]
        dataset = add_dataset(session, home.data, train=[*ROWS, *pairs])
    job = home.tune(method="dpo", training_file=dataset.id)
    home.worker().run_one()
    config = json.loads((home.data / "jobs" / job.id / "config.json").read_text())
    assert (config["method"], config["learning_rate"], len(config["train_files"])) == (
        "dpo",
        1e-5,
        2,
    )
