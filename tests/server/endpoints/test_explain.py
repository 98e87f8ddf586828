"""`explain` through the API."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer, add_candidate, add_deployment


def test_a_release_and_an_answer_explain_themselves(sqlite_gateway: RunningGateway) -> None:
    name = add_candidate(sqlite_gateway.database)
    answer = add_answer(sqlite_gateway.database, "anna")
    curator = sqlite_gateway.client(sqlite_gateway.key("cu", "curate"))

    release = curator.get(f"/admin/explain/{name}")
    of_answer = curator.get(f"/admin/explain/{answer}")

    assert release.json()["release"]["name"] == name
    assert of_answer.status_code == 200
    assert answer in of_answer.text
    assert "assistant@0" in of_answer.text
    for unknown in ("assistant@9", "chatcmpl-none", "nobody"):
        assert curator.get(f"/admin/explain/{unknown}").status_code == 404


def test_a_limited_key_learns_nothing_of_comparisons_with_other_deployments(
    sqlite_gateway: RunningGateway,
) -> None:
    add_deployment(sqlite_gateway.database, "poet")
    here, there = (
        add_answer(sqlite_gateway.database, "anna", deployment=name, text=name)
        for name in ("assistant", "poet")
    )
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    compared = {"completion_ids": [here, there], "preferred": "a"}
    assert anna.post("/v1/comparisons", json=compared).status_code == 201
    explained = [
        sqlite_gateway.client(sqlite_gateway.key(user, "curate", **limits))
        .get(f"/admin/explain/{here}")
        .json()["comparisons"]
        for user, limits in (("bo", {"deployments": ["assistant"]}), ("cu", {}))
    ]
    assert [len(comparisons) for comparisons in explained] == [0, 1]
