"""Jobs through the API."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import update

from feedback.db import Database
from server.settings import LimitSettings
from tests.fake_engine import FakeEngine
from tests.gateway_fixtures import RunningGateway, start_gateway
from tests.rows import add_deployment
from tuner import jobs
from tuner.tables import Job, JobKind, JobStatus


def test_jobs_are_listed_by_kind_status_and_deployment(sqlite_gateway: RunningGateway) -> None:
    database = sqlite_gateway.database
    add_deployment(database, "poet")
    with database.write() as session:
        freeze = jobs.create_job(session, JobKind.FREEZE, spec={}, deployment="assistant").id
        tune = jobs.create_job(session, JobKind.TUNE, spec={}, deployment="poet").id
        erase = jobs.create_job(session, JobKind.ERASE, spec={}).id
    with database.write() as session:
        assert jobs.claim_job(session, "worker", kinds=[JobKind.FREEZE]) is not None
    everybody = sqlite_gateway.client()
    limited = sqlite_gateway.client(sqlite_gateway.key("tu", "tune", deployments=["poet"]))

    def listed(client: object = everybody, **params: str) -> list[str]:
        assert hasattr(client, "get")
        return [row["id"] for row in client.get("/admin/jobs", params=params).json()["data"]]

    assert listed() == [erase, tune, freeze]
    assert listed(kind="freeze") == listed(status="running") == [freeze]
    assert listed(deployment="poet") == listed(limited) == [tune]
    assert listed(after=tune) == [freeze]
    assert everybody.get("/admin/jobs", params={"kind": "bake"}).status_code == 400
    assert limited.get(f"/admin/jobs/{erase}").status_code == 404
    assert limited.get("/admin/jobs", params={"deployment": "assistant"}).status_code == 404


def test_a_failed_job_says_why(sqlite_gateway: RunningGateway) -> None:
    with sqlite_gateway.database.write() as session:
        made = jobs.create_job(session, JobKind.FREEZE, spec={"n": 1}, deployment="assistant")
        job = jobs.claim_job(session, "worker", kinds=[JobKind.FREEZE])
        assert job is not None
        jobs.fail(session, job, "disk_full", "no space left")
    shown = sqlite_gateway.client().get(f"/admin/jobs/{made.id}").json()
    assert (shown["status"], shown["spec"], shown["result"]) == ("failed", {"n": 1}, {})
    assert shown["error"] == {"code": "disk_full", "message": "no space left"}
    assert shown["finished_at"] >= shown["started_at"] >= shown["created_at"]


def test_of_one_user_a_bounded_number_of_jobs_is_unfinished(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    limits = LimitSettings(unfinished_jobs=2)
    with start_gateway(
        sqlite_database, tmp_path / "data", [gateway_engine.address], limits=limits
    ) as gateway:
        first, second = (gateway.client(gateway.key("cu", "curate", "tune")) for _ in range(2))
        freeze = {"deployment": "assistant", "wait_seconds": 0}
        made = [client.post("/admin/datasets", json=freeze) for client in (first, second)]
        assert [reply.status_code for reply in made] == [202, 202]
        release = gateway.candidate(1).name
        tuning = {"model": "assistant", "training_file": made[0].json()["id"]}
        for path, body in (
            ("/admin/datasets", freeze),
            ("/admin/evaluations", {"release": release}),
            ("/v1/fine_tuning/jobs", tuning),
        ):
            refused = first.post(path, json=body)
            assert refused.status_code == 429, (path, refused.text)
            assert "2 jobs of 'cu' wait" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "60"
        other = gateway.client(gateway.key("bo", "curate"))
        assert other.post("/admin/datasets", json=freeze).status_code == 202
        with sqlite_database.write() as session:
            session.execute(update(Job).values(status=JobStatus.SUCCEEDED))
        assert first.post("/admin/datasets", json=freeze).status_code == 202
