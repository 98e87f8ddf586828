"""Tuning jobs, through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from feedback.tables import Dataset
from server.endpoints.fine_tuning import MethodChoice
from server.views.tuning_jobs import MethodUsed
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer, add_dataset, add_deployment
from tuner import jobs
from tuner.deployments import get_deployment
from tuner.job_events import NewEvent
from tuner.methods import Method
from tuner.releases import create_release
from tuner.tables import JobKind


@pytest.fixture
def dataset(sqlite_gateway: RunningGateway) -> Dataset:
    """Eight corrections, frozen."""
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    for number in range(8):
        answer = add_answer(sqlite_gateway.database, "anna", prompt=f"Which bird is {number}?")
        body = {"completion_id": answer, "kind": "correction", "value": f"Number {number} flies."}
        assert anna.post("/v1/feedback", json=body).status_code == 201
    return add_dataset(sqlite_gateway.database, sqlite_gateway.gateway.settings.data)


@pytest.fixture
def client(sqlite_gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    """OpenAI's client with a key that may tune."""
    key = sqlite_gateway.key("tu", "tune")
    with openai.OpenAI(base_url=f"{sqlite_gateway.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_a_job_runs_from_creation_to_a_candidate(
    sqlite_gateway: RunningGateway, dataset: Dataset, client: openai.OpenAI
) -> None:
    made = client.fine_tuning.jobs.create(
        model="gpt-4o-mini",
        training_file=dataset.id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
        seed=7,
        metadata={"team": "birds"},
    )
    assert (made.object, made.status, made.model) == ("fine_tuning.job", "queued", "assistant")
    assert (made.seed, made.metadata) == (7, {"team": "birds"})
    assert (made.hyperparameters.n_epochs, made.hyperparameters.batch_size) == (2, "auto")
    assert made.method is not None
    assert made.method.supervised is not None
    assert (made.fine_tuned_model, made.finished_at, made.trained_tokens) == (None, None, None)

    with sqlite_gateway.database.write() as session:
        job = jobs.claim_job(session, "worker", kinds=[JobKind.TUNE])
        assert job is not None
        release = create_release(
            session,
            get_deployment(session, "assistant"),
            adapter=None,
            system_prompt=None,
            sampling={},
            job_id=job.id,
        )
        jobs.finish(session, job, {"release": release.name, "trained_tokens": 123})
    done = client.fine_tuning.jobs.retrieve(made.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "assistant@1")
    assert (done.trained_tokens, done.error, done.result_files) == (123, None, [])
    assert done.finished_at is not None
    production = sqlite_gateway.client().get("/admin/deployments/assistant").json()["production"]
    assert production == "assistant@0"


def test_one_file_trains_with_the_older_hyperparameters(
    sqlite_gateway: RunningGateway, dataset: Dataset, client: openai.OpenAI
) -> None:
    shown = sqlite_gateway.client().get(f"/admin/datasets/{dataset.id}").json()
    made = client.fine_tuning.jobs.create(
        model="assistant",
        training_file=shown["files"]["supervised"],
        hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 2.0},
    )
    assert made.training_file == shown["files"]["supervised"]
    assert made.hyperparameters.learning_rate_multiplier == 2.0
    assert made.method is not None
    assert made.method.type == "supervised"


def test_dpo_shows_its_beta(
    sqlite_gateway: RunningGateway, dataset: Dataset, client: openai.OpenAI
) -> None:
    made = client.fine_tuning.jobs.create(
        model="assistant",
        training_file=dataset.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
    )
    assert made.method is not None
    assert made.method.dpo is not None
    assert made.method.dpo.hyperparameters is not None
    assert made.method.dpo.hyperparameters.beta == 0.2


def test_a_failed_job_says_why_and_events_come_newest_first(
    sqlite_gateway: RunningGateway, dataset: Dataset, client: openai.OpenAI
) -> None:
    made = client.fine_tuning.jobs.create(model="assistant", training_file=dataset.id)
    with sqlite_gateway.database.write() as session:
        job = jobs.claim_job(session, "worker", kinds=[JobKind.TUNE])
        assert job is not None
        step = NewEvent("Step 1.", type="metrics", data={"loss": 1.5})
        jobs.record_events(session, job, [step])
        jobs.fail(session, job, "diverged", "the loss is not a number")

    failed = client.fine_tuning.jobs.retrieve(made.id)
    events = list(client.fine_tuning.jobs.list_events(made.id, limit=2))  # follows `after`

    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("diverged", "the loss is not a number")
    assert [event.level for event in events] == ["error", "info", "info", "info"]
    assert (events[1].type, events[1].data) == ("metrics", {"loss": 1.5})
    assert events[-1].message == "Job created and queued."


def test_jobs_are_listed_and_cancelled(
    sqlite_gateway: RunningGateway, dataset: Dataset, client: openai.OpenAI
) -> None:
    made = [
        client.fine_tuning.jobs.create(model="assistant", training_file=dataset.id).id
        for _ in range(3)
    ]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == made[::-1]

    assert client.fine_tuning.jobs.cancel(made[0]).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(made[0])
    audit = sqlite_gateway.client().get("/admin/audit", params={"subject": made[0]}).json()
    assert [entry["action"] for entry in audit["data"]] == ["job_cancelled", "job_created"]


def test_what_cannot_be_trained_is_refused_by_name(
    sqlite_gateway: RunningGateway, dataset: Dataset
) -> None:
    tuner = sqlite_gateway.client(sqlite_gateway.key("tu", "tune"))
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"model": "nobody"}, 404, "model"),
        ({"model": "tiny"}, 404, "model"),
        ({"training_file": "file-none"}, 404, "training_file"),
        ({"training_file": "ds_none"}, 404, "training_file"),
        # The data set has corrections alone.
        ({"method": {"type": "kto"}}, 400, "training_file"),
        ({"method": {"type": "dpo", "kto": {}}}, 400, "method.kto"),
        ({"hyperparameters": {"beta": 0.2}}, 400, "hyperparameters.beta"),
        ({"method": {"type": "reinforcement"}}, 400, "method"),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method.supervised"),
        ({"hyperparameters": {"epochs": 3}}, 400, "hyperparameters.epochs"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"r": 64}}, 400, "hyperparameters.r"),
        ({"hyperparameters": {"n" * 65: 1}}, 400, None),
        ({"hyperparameters": {f"n{n}": 1 for n in range(33)}}, 400, "hyperparameters"),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 1}},
                },
            },
            400,
            "hyperparameters",
        ),
        ({"method": {"type": "supervised", "reinforcement": {}}}, 400, "method.reinforcement"),
        ({"method": {"type": "x" * 257}}, 400, "method.type"),
        ({"validation_file": "file-1"}, 404, "validation_file"),
        ({"validation_file": dataset.id}, 400, "validation_file"),
        ({"suffix": ""}, 400, "suffix"),
        ({"suffix": "s" * 65}, 400, "suffix"),
        ({"suffix": "two\nlines"}, 400, "suffix"),
        ({"integrations": [{}] * 17}, 400, "integrations"),
        ({"integrations": "wandb"}, 400, "integrations"),
        ({"seed": -1}, 400, "seed"),
        ({"seed": 2**31}, 400, "seed"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, 400, "metadata"),
        ({"priority": 1}, 400, "priority"),
    ]
    for change, status, param in refused:
        body = {"model": "assistant", "training_file": dataset.id, **change}
        reply = tuner.post("/v1/fine_tuning/jobs", json=body)
        error = reply.json()["error"]
        assert reply.status_code == status, change
        assert error["param"] == param or param is None, change
        assert len(error["message"]) < 400, change
    meaningless = {"validation_file": None, "suffix": None, "integrations": None}
    body = {"model": "assistant", "training_file": dataset.id, **meaningless}
    assert tuner.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    assert len(tuner.get("/v1/fine_tuning/jobs").json()["data"]) == 1


def test_the_key_must_reach_the_data_and_the_deployment(
    sqlite_gateway: RunningGateway, dataset: Dataset
) -> None:
    add_deployment(sqlite_gateway.database, "poet")
    poet = sqlite_gateway.client(sqlite_gateway.key("po", "tune", deployments=["poet"]))
    for model in ("poet", "assistant"):
        body = {"model": model, "training_file": dataset.id}
        assert poet.post("/v1/fine_tuning/jobs", json=body).status_code == 404
    with sqlite_gateway.database.read() as session:
        assert jobs.list_jobs(session, kind=JobKind.TUNE) == ([], False)


def test_a_script_for_openai_uploads_tunes_pauses_and_ends_in_a_candidate(
    sqlite_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Heron?"},
            {"role": "assistant", "content": "A bird."},
        ]
    }
    content = (json.dumps(row) + "\n").encode() * 10
    file = client.files.create(file=("birds.jsonl", content), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(
        model="gpt-4o-mini",
        training_file=file.id,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}},
        },
    )
    assert (made.status, made.training_file) == ("queued", file.id)

    assert client.fine_tuning.jobs.pause(made.id).status == "paused"
    with sqlite_gateway.database.write() as session:
        assert jobs.claim_job(session, "worker", kinds=[JobKind.TUNE]) is None
    assert client.fine_tuning.jobs.resume(made.id).status == "queued"
    with pytest.raises(openai.ConflictError) as refused:
        client.fine_tuning.jobs.resume(made.id)
    assert refused.value.code == "job_not_paused"

    with sqlite_gateway.database.write() as session:
        job = jobs.claim_job(session, "worker", kinds=[JobKind.TUNE])
        assert job is not None
        assert job.spec["files"] == [file.id]
        told = [
            NewEvent("Step 2.", type="metrics", data={"step": 2, "loss": 1.5}),
            NewEvent("Checkpoint at step 2.", type="checkpoint", data={"step": 2}),
            NewEvent("Checkpoint at step 4.", type="checkpoint", data={"step": 4}),
        ]
        jobs.record_events(session, job, told)
    assert client.fine_tuning.jobs.pause(made.id).status == "running"  # until its worker hears it
    with sqlite_gateway.database.write() as session:
        assert jobs.beat(session, job) == jobs.StopRequest.PAUSE
        deployment = get_deployment(session, "assistant")
        texts: dict[str, Any] = {"system_prompt": None, "sampling": {}}
        create_release(session, deployment, adapter=None, job_id=job.id, **texts)
        jobs.finish(session, job, {})
    done = client.fine_tuning.jobs.retrieve(made.id)
    assert (done.status, done.fine_tuned_model) == ("succeeded", "assistant@1")

    saved = list(client.fine_tuning.jobs.checkpoints.list(made.id, limit=1))  # follows `after`
    assert [(point.step_number, point.metrics.train_loss) for point in saved] == [
        (4, None),
        (2, 1.5),
    ]
    assert {point.fine_tuning_job_id for point in saved} == {made.id}
    events = list(client.fine_tuning.jobs.list_events(made.id))
    assert {event.type for event in events} == {"message", "metrics"}
    assert [event.message for event in events][-4:] == [
        "Job started.",
        "Job resumed: queued again.",
        "Job paused.",
        "Job created and queued.",
    ]
    audit = sqlite_gateway.client().get("/admin/audit", params={"subject": made.id}).json()
    assert [entry["action"] for entry in audit["data"]] == [
        "job_paused",
        "job_resumed",
        "job_paused",
        "job_created",
    ]


def test_an_upload_of_another_kind_than_the_method_learns_from_is_refused(
    sqlite_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    row = {"prompt": "Heron?", "completion": "A bird."}
    taught = {
        "supervised": row,
        "preference": {"prompt": "Heron?", "chosen": "A bird.", "rejected": "A fish."},
        "labelled": {**row, "label": True},
    }
    files = {
        kind: client.files.create(file=(kind, json.dumps(record).encode()), purpose="fine-tune").id
        for kind, record in taught.items()
    }
    for kind, method in (("supervised", "dpo"), ("preference", "supervised"), ("labelled", "dpo")):
        with pytest.raises(openai.BadRequestError, match=f"has {kind} examples") as refused:
            client.fine_tuning.jobs.create(
                model="assistant", training_file=files[kind], method={"type": method}
            )
        assert refused.value.param == "training_file"
    for kind, method in (
        ("preference", "dpo"), ("labelled", "kto"), ("labelled", "combined"),
        ("supervised", "combined"),
    ):  # fmt: skip
        chosen: Any = {"type": method, method: {"hyperparameters": {"n_epochs": 2}}}
        made = client.fine_tuning.jobs.create(
            model="assistant", training_file=files[kind], method=chosen
        )
        assert made.status == "queued"
        assert made.to_dict()["method"]["type"] == method
        assert made.to_dict()["method"][method]["hyperparameters"]["n_epochs"] == 2


def test_all_of_openais_fields_are_taken(
    sqlite_gateway: RunningGateway, client: openai.OpenAI
) -> None:
    def upload(question: str) -> str:
        row = {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "A bird."},
            ]
        }
        return client.files.create(
            file=("birds.jsonl", json.dumps(row).encode()), purpose="fine-tune"
        ).id

    trained, held = upload("Heron?"), upload("Stork?")
    reply = client.fine_tuning.jobs.with_raw_response.create(
        model="gpt-4o-mini",
        training_file=trained,
        validation_file=held,
        suffix="short answers",
        seed=2**31 - 1,
        metadata={"team": "birds"},
        integrations=[{"type": "wandb", "wandb": {"project": "birds"}}],
        # Scripts repeat "auto" in the deprecated place.
        hyperparameters={"n_epochs": "auto"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 2,
                    "batch_size": "auto",
                    "learning_rate_multiplier": "auto",
                }
            },
        },
    )
    made = reply.parse()
    assert reply.headers["x-burnish-ignored"] == "integrations"
    assert (made.training_file, made.validation_file) == (trained, held)
    assert (made.seed, made.metadata, made.integrations) == (2**31 - 1, {"team": "birds"}, [])
    assert made.hyperparameters.n_epochs == 2
    assert made.to_dict()["user_provided_suffix"] == "short answers"
    assert client.fine_tuning.jobs.retrieve(made.id).to_dict() == made.to_dict()

    # Until the job has ended, nobody takes what validates it away.
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(held)
    assert refused.value.code == "file_in_use"

    with sqlite_gateway.database.write() as session:
        job = jobs.claim_job(session, "worker", kinds=[JobKind.TUNE])
        assert job is not None
        told = [
            NewEvent("Step 2.", type="metrics", data={"step": 2, "loss": 1.5}),
            NewEvent("Epoch 1.", type="validation", data={"step": 2, "full_valid_loss": 1.25}),
            NewEvent("Checkpoint at step 2.", type="checkpoint", data={"step": 2}),
        ]
        jobs.record_events(session, job, told)
    (point,) = client.fine_tuning.jobs.checkpoints.list(made.id)
    assert (point.metrics.train_loss, point.metrics.full_valid_loss) == (1.5, 1.25)
    events = {event.message: event.type for event in client.fine_tuning.jobs.list_events(made.id)}
    assert (events["Epoch 1."], events["Checkpoint at step 2."]) == ("metrics", "message")


def test_a_strict_gateway_refuses_what_it_would_ignore(
    sqlite_gateway: RunningGateway, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sqlite_gateway.gateway.settings
    strict = settings.gateway.model_copy(update={"strict": True})
    monkeypatch.setattr(
        sqlite_gateway.gateway, "settings", settings.model_copy(update={"gateway": strict})
    )
    tuner = sqlite_gateway.client(sqlite_gateway.key("tu", "tune"))
    body = {"model": "assistant", "training_file": dataset.id}
    refused = tuner.post("/v1/fine_tuning/jobs", json={**body, "integrations": [{"type": "wandb"}]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "integrations")
    assert tuner.post("/v1/fine_tuning/jobs", json={**body, "integrations": []}).is_success


def test_another_persons_upload_validates_nothing(
    sqlite_gateway: RunningGateway, dataset: Dataset
) -> None:
    ann, ben = (sqlite_gateway.client(sqlite_gateway.key(who, "tune")) for who in ("ann", "ben"))
    row = json.dumps({"prompt": "Heron?", "completion": "A bird."})
    held = ann.post("/v1/files", files={"file": row}, data={"purpose": "fine-tune"}).json()["id"]
    body = {"model": "assistant", "training_file": dataset.id, "validation_file": held}
    refused = ben.post("/v1/fine_tuning/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "validation_file")
    assert ann.post("/v1/fine_tuning/jobs", json=body).is_success


def test_the_api_takes_and_shows_every_method() -> None:
    assert set(MethodChoice.model_fields) - {"type", "reinforcement"} == set(Method)
    assert set(MethodUsed.__annotations__) - {"type"} == set(Method)
