"""For tests that call every route: one of everything that a deployment and its user can have, and
whether something happened.
"""

from __future__ import annotations

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
from tuner.releases import get_deployment
from tuner.tuning import create_tuning_job


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
