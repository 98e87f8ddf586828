"""`explain` through the API."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer, add_candidate


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
