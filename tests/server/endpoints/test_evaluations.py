"""Evaluations through the API."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_candidate, add_deployment, add_evaluation
from tuner import jobs
from tuner.tables import JobKind


def test_an_evaluation_is_queued_against_production(sqlite_gateway: RunningGateway) -> None:
    name = add_candidate(sqlite_gateway.database)
    tuner = sqlite_gateway.client(sqlite_gateway.key("tu", "tune", "curate"))

    asked = tuner.post("/admin/evaluations", json={"release": name})

    assert asked.status_code == 202
    shown = asked.json()
    assert (shown["status"], shown["release"], shown["baseline"], shown["decision"]) == (
        "queued",
        name,
        "assistant@0",
        None,
    )
    with sqlite_gateway.database.read() as session:
        assert jobs.get_job(session, shown["job_id"]).kind == JobKind.EVALUATE
    assert tuner.get(f"/admin/evaluations/{shown['id']}").json() == shown


def test_status_follows_the_job(sqlite_gateway: RunningGateway) -> None:
    name = add_candidate(sqlite_gateway.database)
    admin = sqlite_gateway.client()
    asked = admin.post("/admin/evaluations", json={"release": name}).json()
    path = f"/admin/evaluations/{asked['id']}"

    with sqlite_gateway.database.write() as session:
        job = jobs.claim_job(session, "worker", kinds=[JobKind.EVALUATE])
    assert admin.get(path).json()["status"] == "running"
    with sqlite_gateway.database.write() as session:
        assert job is not None
        jobs.fail(session, job, "no_engine", "no engine came")
    failed = admin.get(path).json()
    assert (failed["status"], failed["error"], failed["decision"]) == (
        "failed",
        "no engine came",
        None,
    )

    decided = add_evaluation(sqlite_gateway.database, name)
    finished = admin.get(f"/admin/evaluations/{decided.id}").json()
    assert (finished["status"], finished["decision"]) == ("finished", "pass")


def test_evaluations_are_listed_by_release(sqlite_gateway: RunningGateway) -> None:
    one, two = (add_candidate(sqlite_gateway.database) for _ in range(2))
    made = [add_evaluation(sqlite_gateway.database, name).id for name in (one, two, one)]
    admin = sqlite_gateway.client()

    of_one = admin.get("/admin/evaluations", params={"release": one}).json()["data"]
    first = admin.get("/admin/evaluations", params={"limit": 2}).json()
    rest = admin.get("/admin/evaluations", params={"after": first["last_id"]}).json()

    assert [row["id"] for row in of_one] == [made[2], made[0]]
    assert [row["id"] for row in first["data"] + rest["data"]] == made[::-1]


def test_what_cannot_be_compared_is_refused(sqlite_gateway: RunningGateway) -> None:
    add_deployment(sqlite_gateway.database, "poet")
    name = add_candidate(sqlite_gateway.database)
    admin = sqlite_gateway.client()
    refused: list[tuple[dict[str, object], int, str]] = [
        ({"release": "assistant@9"}, 404, "release"),
        ({"release": name, "baseline": "assistant@9"}, 404, "baseline"),
        ({"release": name, "baseline": name}, 400, "baseline"),
        ({"release": name, "baseline": "poet@0"}, 400, "baseline"),
        ({"release": "assistant@0"}, 400, "baseline"),
        ({"release": name, "threshold": 1}, 400, "threshold"),
    ]
    for body, status, param in refused:
        reply = admin.post("/admin/evaluations", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), body
    assert admin.get("/admin/jobs").json()["data"] == []
