"""Data sets through the API."""

from __future__ import annotations

import threading

import httpx

from feedback.tables import Dataset
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer, add_dataset
from tuner import jobs
from tuner.tables import JobKind


def _fail_the_freeze(running: RunningGateway) -> None:
    """What a worker does that meets a full disk."""
    with running.database.write() as session:
        job = jobs.claim_job(session, "worker", kinds=[JobKind.FREEZE])
        assert job is not None
        jobs.fail(session, job, "disk_full", "no space left")


def test_work_that_takes_longer_is_told_as_queued(running_gateway: RunningGateway) -> None:
    curator = running_gateway.client(running_gateway.key("cu", "curate"))
    body = {"deployment": "assistant", "wait_seconds": 0, "policy": {"person_cap": 3}}

    asked = curator.post("/admin/datasets", json=body)

    assert (asked.status_code, asked.json()["status"]) == (202, "queued")
    assert asked.json()["files"] == {"supervised": None, "preference": None, "labelled": None}
    with running_gateway.database.read() as session:
        row = session.get_one(Dataset, asked.json()["id"])
        assert (row.policy["person_cap"], row.created_by) == (3, "cu")
        job = jobs.get_job(session, row.job_id or "")
        assert (job.kind, job.spec) == ("freeze", {"dataset_id": row.id})


def test_the_reply_waits_for_the_end(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    replies: list[httpx.Response] = []
    body = {"deployment": "assistant", "wait_seconds": 30}
    asking = threading.Thread(
        target=lambda: replies.append(admin.post("/admin/datasets", json=body))
    )
    asking.start()
    while True:
        with running_gateway.database.read() as session:
            if jobs.has_queued(session, [JobKind.FREEZE]):
                break
    _fail_the_freeze(running_gateway)
    asking.join(10)

    assert (replies[0].status_code, replies[0].json()["status"]) == (201, "failed")
    assert replies[0].json()["error"] == "no space left"


def test_a_ready_data_set_has_counts_files_and_reasons(running_gateway: RunningGateway) -> None:
    anna = running_gateway.client(running_gateway.key("anna"))
    for number in range(8):
        answer = add_answer(running_gateway.database, "anna", prompt=f"Which bird is {number}?")
        anna.post("/v1/feedback", json={"completion_id": answer, "kind": "rating", "value": True})
    made = add_dataset(running_gateway.database, running_gateway.gateway.settings.data)

    shown = running_gateway.client().get(f"/admin/datasets/{made.id}").json()

    assert (shown["object"], shown["status"]) == ("dataset", "ready")
    assert shown["counts"]["labelled"] + shown["counts"]["holdout"] == 8
    assert shown["files"]["labelled"].startswith("file-")
    assert shown["content_hash"] == made.content_hash
    listed = running_gateway.client().get("/admin/datasets").json()["data"]
    assert [row["id"] for row in listed] == [made.id]


def test_the_deployments_policy_holds_unless_it_is_overridden(
    sqlite_gateway: RunningGateway,
) -> None:
    admin = sqlite_gateway.client()
    policies = {"curation": {"person_cap": 7, "holdout_share": 0.5}}
    admin.patch("/admin/deployments/assistant", json={"policies": policies})
    body = {"deployment": "assistant", "wait_seconds": 0, "policy": {"person_cap": 9}}
    made = admin.post("/admin/datasets", json=body).json()
    with sqlite_gateway.database.read() as session:
        policy = session.get_one(Dataset, made["id"]).policy
    assert (policy["person_cap"], policy["holdout_share"]) == (9, 0.5)


def test_what_no_data_set_can_be_is_refused(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    refused: list[tuple[dict[str, object], int]] = [
        ({"deployment": "nobody"}, 404),
        ({"deployment": "gpt-4o-mini"}, 404),
        ({"policy": {"cap": 1}}, 400),
        ({"wait_seconds": 601}, 400),
        ({"wait": 1}, 400),
    ]
    for change, status in refused:
        body = {"deployment": "assistant", "wait_seconds": 0, **change}
        assert admin.post("/admin/datasets", json=body).status_code == status, change
    assert admin.get("/admin/datasets").json()["data"] == []


def test_asking_for_a_data_set_is_written_down(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    body = {"deployment": "assistant", "wait_seconds": 0}
    made = admin.post("/admin/datasets", json=body).json()
    entry = admin.get("/admin/audit", params={"subject": made["id"]}).json()["data"][0]
    assert (entry["action"], entry["details"]["deployment"]) == ("dataset_requested", "assistant")
