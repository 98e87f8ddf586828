"""Fixtures for tests that call every route: one object of every kind, and a check for changes.

The objects belong to a deployment and its user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from sqlalchemy import select

from feedback.db import Base, Database
from feedback.tables import Answer
from tests.gateway_fixtures import RunningGateway
from tests.rows import (
    add_answer,
    add_candidate,
    add_dataset,
    add_deployment,
    add_evaluation,
    build_adapter,
)
from tuner.deployments import get_deployment
from tuner.tuning import create_tuning_job

Route = tuple[str, str]

#: Routes whose body names what it is about, and those bodies.
BODIES: dict[Route, Callable[[dict[str, str]], list[dict[str, Any]]]] = {
    ("POST", "/v1/chat/completions"): lambda ids: [
        {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        for model in (ids["name"], ids["release"])
    ],
    ("POST", "/v1/chat/completions/{completion_id}"): lambda ids: [{"metadata": {"a": "b"}}],
    ("POST", "/v1/completions"): lambda ids: [{"model": ids["name"], "prompt": "Hello"}],
    ("POST", "/v1/feedback"): lambda ids: [
        {"completion_id": ids["completion_id"], "kind": "rating", "value": True},
        {"conversation_id": ids["conversation_id"], "kind": "rating", "value": True},
    ],
    ("POST", "/v1/feedback/tokens"): lambda ids: [
        {"completion_id": ids["completion_id"], "expires_in_seconds": 60}
    ],
    ("POST", "/v1/comparisons"): lambda ids: [
        {"completion_ids": [ids["completion_id"], ids["other_id"]], "preferred": "a"}
    ],
    ("POST", "/v1/fine_tuning/jobs"): lambda ids: [
        {"model": ids["name"], "training_file": ids["dataset_id"]},
        {"model": "assistant", "training_file": ids["dataset_id"]},
        {"model": "assistant", "training_file": ids["file_id"]},
    ],
    ("POST", "/admin/datasets"): lambda ids: [{"deployment": ids["name"], "wait_seconds": 0}],
    ("POST", "/admin/evaluations"): lambda ids: [
        {"release": ids["release"]},
        {"release": "assistant@0", "baseline": ids["release"]},
    ],
    ("POST", "/admin/keys"): lambda ids: [
        {"user": "x", "scopes": ["chat"], "deployments": [ids["name"]]}
    ],
    ("POST", "/admin/deployments/{name}/promote"): lambda ids: [{"release": ids["release"]}],
}


def add_everything(running: RunningGateway, deployment: str, user: str) -> dict[str, str]:
    """Make the deployment, and for it all that has an id; the ids by the names of parameters."""
    database = running.database
    add_deployment(database, deployment)
    owner = running.client(running.key(user))
    answers = [
        add_answer(database, user, deployment=deployment, text=f"Answer {number}.")
        for number in range(2)
    ]
    for number in range(8):
        answer = add_answer(database, user, deployment=deployment, prompt=f"Bird {number}?")
        body = {"completion_id": answer, "kind": "correction", "value": f"It is a {number}."}
        owner.post("/v1/feedback", json=body)
    rating = {"completion_id": answers[0], "kind": "rating", "value": True}
    judgement = owner.post("/v1/feedback", json=rating).json()["id"]
    dataset = add_dataset(database, running.gateway.settings.data, deployment)
    adapter = build_adapter()
    release = add_candidate(database, deployment, adapter=adapter)
    evaluation = add_evaluation(database, release)
    with database.write() as session:
        job = create_tuning_job(
            session,
            get_deployment(session, deployment),
            method="supervised",
            training_file=dataset.id,
        )
    admin = running.client()
    key = admin.post("/admin/keys", json={"user": user, "scopes": ["chat"]}).json()["id"]
    files = admin.get(f"/admin/datasets/{dataset.id}").json()["files"]
    with database.read() as session:
        conversation_id = session.get_one(Answer, answers[0]).conversation_id
    return {
        "completion_id": answers[0],
        "other_id": answers[1],
        "conversation_id": conversation_id,
        "judgement_id": judgement,
        "name": deployment,
        "deployment": deployment,
        "model": deployment,
        "release": release,
        "adapter_id": adapter.id,
        "dataset_id": dataset.id,
        "file_id": files["supervised"],
        "evaluation_id": evaluation.id,
        "job_id": job.id,
        "key_id": key,
        "subject": release,
    }


def call(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    writes = method in ("POST", "PATCH")
    return client.request(method, path, json=(body or {}) if writes else None)


def list_rows(database: Database) -> dict[str, list[Any]]:
    """All rows of all tables."""
    with database.read() as session:
        return {
            table.name: sorted(map(repr, session.execute(select(table))))
            for table in Base.metadata.sorted_tables
        }
