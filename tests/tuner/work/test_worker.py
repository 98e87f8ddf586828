"""The worker: jobs from claim to result, and what is left when one is lost, cancelled or fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError

from feedback import audit
from feedback.curation.policy import Policy
from feedback.datasets import create_dataset
from feedback.datasets import freeze as freeze_dataset
from feedback.db import Database
from feedback.judgements import NewJudgement, judge
from feedback.tables import Dataset, DatasetStatus, File
from tests.engine_fixtures import TINY_SHAPE
from tests.feedback.record import ask, make_viewer
from tests.tiny_adapters import TARGET_MODULES, build_tiny_adapter
from tests.tuner.gateway import FakeGateway
from tests.tuner.records import (
    add_dataset,
    add_file,
    make_adapter,
    make_candidate,
    preference,
    supervised,
)
from tuner import jobs
from tuner.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterStore, build_adapter_config
from tuner.base_models import BaseModel, describe_base
from tuner.evaluation.evaluations import create_evaluation
from tuner.releases import create_deployment, get_deployment, move_production
from tuner.tables import Adapter, Evaluation, Job, JobKind, JobStatus, Release
from tuner.tuning import create_freeze_job, create_tuning_job
from tuner.work.remains import trainer_place
from tuner.work.workbench import WorkerOptions
from tuner.work.worker import Worker

ROWS = [supervised(f"ex_{number}", f"Question {number}?", "Good.") for number in range(4)]
HOLDOUT = [supervised(f"ex_h{number}", f"Held {number}?", "Good.") for number in range(6)]

TRAINER = """
import json, os, shutil, sys, time
from pathlib import Path
mode, made, config_file = sys.argv[1:]
config = json.loads(Path(config_file).read_text())
out = Path(config["output_dir"])
def tell(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
tell("started", examples=4, steps=2, tokens=70, message="Training begins.", pid=os.getpid())
print("a line of the log", file=sys.stderr)
tell("step", step=1, steps=2, epoch=1, loss=0.5)
(out / "checkpoints").mkdir(exist_ok=True)
if mode == "wait":
    time.sleep(120)
if mode == "guard":
    tell("failed", code="kl_too_large", message="KL to the base is 9 nats per token.")
    sys.exit(3)
shutil.copytree(made, out / "adapter", dirs_exist_ok=True)
tell("finished", adapter=str(out / "adapter"), metrics={"loss": 0.5},
     probe={"prompts": [], "base": [[-1.0]], "adapter": [[-2.0]], "dtype": "float32"},
     manifest={"epochs": 3, "settings": [key for key in os.environ if key.startswith("BURNISH_")]})
"""


def write_base(folder: Path) -> Path:
    """The files of a model of the tiny shape, as far as they are read without torch."""
    folder.mkdir(parents=True)
    facts = {"model_type": "llama", "max_position_embeddings": 512, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps({**facts, **TINY_SHAPE}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    shapes = {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (256, 128),
        "mlp.up_proj": (256, 128),
        "mlp.down_proj": (128, 256),
    }
    tensors = {
        f"model.layers.{layer}.{name}.weight": np.zeros(shape, np.float16)
        for layer in range(2)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@dataclass
class Home:
    """A data directory with a base, a deployment, a trainer's result, and a gateway."""

    database: Database
    data: Path
    base: BaseModel
    gateway: FakeGateway = field(default_factory=FakeGateway)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def made(self) -> Path:
        """What the trainer hands over as its adapter."""
        return self.data / "made"

    def options(self, mode: str = "good", **values: Any) -> WorkerOptions:
        script = self.data / "trainer.py"
        script.write_text(TRAINER)
        return WorkerOptions(
            **{
                "database_url": self.database.url.render_as_string(hide_password=False),
                "data": self.data,
                "model_dir": self.base.path,
                "base_name": "tiny",
                "gateway_url": "http://gateway",
                "api_key": "secret",
                "poll_seconds": 0.02,
                "trainer": (sys.executable, str(script), mode, str(self.made)),
                **values,
            }
        )

    def worker(self, mode: str = "good", **values: Any) -> Worker:
        client = self.gateway.client(stopped=self.stopping)
        options = self.options(mode, **values)
        return Worker(self.database, options, client, stopping=self.stopping)

    def tune(self, **values: Any) -> Job:
        """Queue a tuning job on a data set with a holdout."""
        with self.database.write() as session:
            dataset = add_dataset(session, self.data, train=ROWS, holdout=HOLDOUT)
            deployment = get_deployment(session, "assistant")
            return create_tuning_job(
                session,
                deployment,
                **{"method": "supervised", "training_file": dataset.id, "created_by": "ann"}
                | values,
            )

    def evaluate(self) -> tuple[Evaluation, Job]:
        """Queue an evaluation of a candidate."""
        with self.database.write() as session:
            dataset = add_dataset(session, self.data, holdout=HOLDOUT)
            adapter = make_adapter(session, base_revision=self.base.revision)
            release = make_candidate(session, dataset_id=dataset.id, adapter=adapter)
            return create_evaluation(session, release)

    def job(self, job: Job) -> Job:
        with self.database.read() as session:
            return jobs.get_job(session, job.id)

    def events(self, job: Job) -> list[str]:
        with self.database.read() as session:
            events, _ = jobs.list_events(session, job.id, newest_first=False, limit=100)
            return [event.message for event in events]

    def count(self, table: type[Any]) -> int:
        with self.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what another thread or process does."""
        waiting = threading.Event()
        for _ in range(2000):
            if condition():
                return
            waiting.wait(0.01)
        pytest.fail("it did not happen within 20 seconds")

    def begun(self, job: Job) -> None:
        self.until(lambda: "Training begins." in self.events(job))


def make_home(database: Database, data: Path) -> Home:
    base = describe_base(write_base(data / "base"), "tiny")
    home = Home(database, data, base)
    build_tiny_adapter(base.path, home.made, seed=1)
    (home.made / CONFIG_FILE).write_bytes(
        build_adapter_config(
            r=8,
            lora_alpha=16,
            target_modules=TARGET_MODULES,
            base_name="tiny",
            base_revision=base.revision,
        )
    )
    with database.write() as session:
        create_deployment(
            session,
            name="assistant",
            base_model="tiny",
            base_revision=base.revision,
            template_hash=base.template_hash,
            system_prompt="Be kind.",
            sampling={"temperature": 0.5},
        )
    return home


@pytest.fixture
def home(sqlite_database: Database, tmp_path: Path) -> Home:
    return make_home(sqlite_database, tmp_path)


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

    home.gateway.logprob = lambda model, text: (
        -1.0 if ("@" in model) == text.removesuffix(".").isdigit() else -4.0
    )
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
        events, _ = jobs.list_events(session, job.id, newest_first=False, limit=100)
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


def delete_file(home: Home, job: Job) -> None:
    with home.database.write() as session:
        session.delete(session.get_one(File, job.spec["files"][0]))


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


def in_thread(worker: Worker) -> threading.Thread:
    thread = threading.Thread(target=worker.run_one)
    thread.start()
    return thread


def take_over(home: Home, job: Job) -> None:
    """As another worker does that claims the job after a stall."""
    with home.database.write() as session:
        session.execute(
            update(Job).where(Job.id == job.id).values(attempt=Job.attempt + 1, worker="other")
        )


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


def ask_to_cancel(home: Home, job: Job) -> None:
    with home.database.write() as session:
        jobs.request_cancel(session, job.id)


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


def test_a_freeze_whose_lease_is_lost_makes_nothing_ready(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with home.database.write() as session:
        dataset = create_dataset(session, "assistant", Policy(), created_by=None)
        job = create_freeze_job(session, dataset)

    def freeze_and_lose(*arguments: Any, **options: Any) -> Any:
        frozen = freeze_dataset(*arguments, **options)
        take_over(home, job)
        return frozen

    monkeypatch.setattr("tuner.work.freeze.freeze", freeze_and_lose)
    home.worker(poll_seconds=60.0, lease_seconds=600.0).run_one()
    with home.database.read() as session:
        assert session.get_one(Dataset, dataset.id).status == DatasetStatus.RUNNING
    assert home.count(File) == 0


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
        events, _ = jobs.list_events(session, job.id, limit=100)
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


def names_below(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


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


@pytest.mark.parametrize("path", ["/internal/evaluation-slot", "/internal/score"])
def test_a_stopping_worker_gives_its_evaluation_back_while_the_gateway_is_silent(
    home: Home, path: str
) -> None:
    evaluation, job = home.evaluate()
    home.gateway.silent = path
    home.gateway.may_reply.clear()
    thread = threading.Thread(target=home.worker().run)
    thread.start()
    assert home.gateway.asked.wait(20)
    home.stopping.set()
    thread.join(20)
    home.gateway.may_reply.set()
    assert not thread.is_alive()
    assert home.job(job).status == JobStatus.QUEUED
    home.stopping.clear()
    assert home.worker().run_one()
    with home.database.read() as session:
        assert session.get_one(Evaluation, evaluation.id).decision == "pass"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/internal/evaluation-slot", 404, "not_found"),
        ("/internal/score", 502, "gateway_refused"),
        ("/internal/score", 503, "gateway_unreachable"),
    ],
)
def test_an_evaluation_that_the_gateway_refuses_says_so(
    home: Home, path: str, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation, job = home.evaluate()
    error = {"message": "a zyzzyva", "code": "not_found" if status == 404 else None}
    home.gateway.failing[path] = httpx.Response(
        status, json={"error": error}, headers={"retry-after": "30"}
    )
    with caplog.at_level("INFO"):
        home.worker().run_one()
    assert home.job(job).error_code == code
    assert "Job ended" in caplog.text
    assert "zyzzyva" in str(home.job(job).error_message)
    assert "zyzzyva" not in caplog.text  # an engine's words may repeat a prompt
    with home.database.read() as session:
        found = session.get_one(Evaluation, evaluation.id)
        assert (found.decision, found.error) == (None, home.job(job).error_message)


def test_an_evaluation_without_its_holdouts_file_says_so(home: Home) -> None:
    _, job = home.evaluate()
    for file in (home.data / "files").iterdir():
        file.unlink()
    home.worker().run_one()
    assert home.job(job).error_code == "holdout_missing"


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
            events, _ = jobs.list_events(session, job.id, limit=100)
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
        events, _ = jobs.list_events(session, job.id, limit=100)
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
