"""What the worker's tests work in: a data directory, a trainer that trains nothing, a gateway."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import func, select, update

from feedback.db import Database
from feedback.tables import File
from tests.engine_fixtures import TINY_SHAPE
from tests.tiny_adapters import TARGET_MODULES, build_tiny_adapter
from tests.tuner.gateway import FakeGateway
from tests.tuner.records import (
    add_dataset,
    make_adapter,
    make_candidate,
    supervised,
)
from tuner import job_events, jobs
from tuner.adapters import CONFIG_FILE, build_adapter_config
from tuner.base_models import BaseModel, describe_base
from tuner.deployments import create_deployment, get_deployment
from tuner.evaluation.evaluations import create_evaluation
from tuner.tables import Evaluation, Job
from tuner.tuning import create_tuning_job
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
            events, _ = job_events.list_events(session, job.id, newest_first=False, limit=100)
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


def ask_to_cancel(home: Home, job: Job) -> None:
    with home.database.write() as session:
        jobs.request_cancel(session, job.id)


def delete_file(home: Home, job: Job) -> None:
    with home.database.write() as session:
        session.delete(session.get_one(File, job.spec["files"][0]))


def names_below(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()
