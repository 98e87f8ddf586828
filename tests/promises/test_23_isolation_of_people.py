"""Promise 23: ids of other people, and of deployments outside the key's list, are unknown.

They are so to every route, and asking about them changes nothing.

The tables below name every route of `auth.ROUTES`; one that is in none of them fails a test.
"""

from __future__ import annotations

import json
import re

import pytest

from feedback.tables import Answer
from server.access.scopes import ROUTES, Scope
from tests.everything import BODIES, Route, add_everything, call, list_rows
from tests.gateway_fixtures import EVERY_SCOPE, RunningGateway
from tests.promise_fixtures import Figures

pytestmark = pytest.mark.promises

#: Routes about answers and verdicts, which belong to people.
PERSONAL = {route for route in ROUTES if re.search(r"{completion_id}|{judgement_id}", route[1])}
#: Lists, with the parameters that name something foreign.
LISTS: dict[Route, tuple[str, ...]] = {
    ("GET", "/v1/chat/completions"): (),
    ("GET", "/v1/models"): (),
    ("GET", "/v1/feedback"): (),
    ("GET", "/v1/files"): ("file_id",),
    ("GET", "/v1/fine_tuning/jobs"): ("job_id",),
    ("GET", "/admin/deployments"): (),
    ("GET", "/admin/releases"): ("release", "deployment"),
    ("GET", "/admin/datasets"): ("dataset_id", "deployment"),
    ("GET", "/admin/evaluations"): ("evaluation_id", "deployment"),
    ("GET", "/admin/jobs"): ("job_id", "deployment"),
    ("GET", "/admin/keys"): (),
}
#: About the key itself, the process, or all deployments together.
OF_NOBODY = {
    ("GET", "/admin/whoami"),
    ("GET", "/admin/audit"),
    ("GET", "/admin/audit/verify"),
    ("GET", "/metrics"),
    ("POST", "/admin/deployments"),
    ("POST", "/v1/files"),  # a form, of no deployment
}


@pytest.fixture
def foreign(running_gateway: RunningGateway) -> dict[str, str]:
    """Ids of everything that the deployment `poet` and its user Bea have, by parameter name."""
    return add_everything(running_gateway, "poet", "bea")


def test_the_tables_of_this_file_name_every_route() -> None:
    assert len(PERSONAL) == 6
    named = {*PERSONAL, *BODIES, *LISTS, *OF_NOBODY}
    by_path = {route for route in ROUTES if "{" in route[1]}
    internal = {route for route, scope in ROUTES.items() if scope is Scope.INTERNAL}
    assert named <= ROUTES.keys()
    assert named | by_path | internal == ROUTES.keys()


def test_somebody_elses_ids_are_unknown_and_nothing_happens(
    running_gateway: RunningGateway, foreign: dict[str, str], figures: Figures
) -> None:
    anna = running_gateway.client(running_gateway.key("anna"))
    shop = running_gateway.client(running_gateway.key("shop", "chat", "feedback", end_users=True))
    for client in (anna, shop):
        client.get("/admin/whoami")  # their people are made by their first request
    before = list_rows(running_gateway.database)
    bodies = {
        ("POST", path): BODIES["POST", path]
        for path in ("/v1/feedback", "/v1/feedback/tokens", "/v1/comparisons")
    }
    for client in (anna, shop):
        for method, template in PERSONAL:
            body = {"metadata": {"a": "b"}} if method == "POST" else None
            reply = call(client, method, template.format_map(foreign), body)
            assert reply.status_code == 404, (method, template, reply.text)
        for (method, path), build in bodies.items():
            for body in build(foreign):
                assert client.request(method, path, json=body).status_code == 404, body
        for path in ("/v1/feedback", "/v1/chat/completions"):
            assert client.get(path).json()["data"] == []
            reply = client.get(path, params={"after": foreign["judgement_id"]})
            assert reply.status_code == 404
    assert list_rows(running_gateway.database) == before
    figures(callers=2, routes=len(PERSONAL) + len(bodies), found=0, changed=0)


def test_deployments_outside_the_keys_list_are_unknown_and_nothing_happens(
    running_gateway: RunningGateway, foreign: dict[str, str], figures: Figures
) -> None:
    key = running_gateway.key("max", *EVERY_SCOPE, deployments=["assistant"])
    limited = running_gateway.client(key)
    limited.get("/admin/whoami")
    before = list_rows(running_gateway.database)
    by_path = [route for route, scope in ROUTES.items() if "{" in route[1] and scope != "internal"]
    for method, template in by_path:
        release = template.startswith("/admin/releases")
        ids = {**foreign, "name": foreign["release"]} if release else foreign
        path = template.replace(":path", "").format_map(ids)
        build = BODIES.get((method, template))
        for body in build(foreign) if build else [None]:
            reply = call(limited, method, path, body)
            assert reply.status_code == 404, (method, path, reply.text)
    told = limited.get(f"/admin/explain/{foreign['completion_id']}")
    assert told.status_code == 404
    own = "/admin/deployments/assistant/promote"
    assert call(limited, "POST", own, {"release": foreign["release"]}).status_code == 404
    for (method, template), build in BODIES.items():
        for body in build(foreign) if "{" not in template else []:
            reply = call(limited, method, template, body)
            assert reply.status_code == 404, (method, template, body, reply.text)
    for (method, path), parameters in LISTS.items():
        shown = limited.request(method, path).text
        hidden = [name for name, value in foreign.items() if f'"{value}"' in shown]
        assert not hidden, (path, hidden)
        for name in parameters:
            given = {"deployment" if name == "deployment" else "after": foreign[name]}
            assert limited.get(path, params=given).status_code == 404, (path, given)
    assert list_rows(running_gateway.database) == before
    figures(routes=len({*by_path, *BODIES, *LISTS}), found=0, changed=0)


def test_an_administrator_of_all_deployments_reaches_each_of_them(
    running_gateway: RunningGateway, foreign: dict[str, str]
) -> None:
    admin = running_gateway.client()
    for (method, template), scope in ROUTES.items():
        if method == "GET" and "{" in template and scope is not Scope.INTERNAL:
            release = template.startswith("/admin/releases")
            ids = {**foreign, "name": foreign["release"]} if release else foreign
            reply = admin.get(template.replace(":path", "").format_map(ids))
            assert reply.status_code == 200, (template, reply.text)


def test_somebody_elses_uploads_are_unknown_and_stay(
    running_gateway: RunningGateway, figures: Figures
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    content = (json.dumps({"messages": turns}) + "\n").encode() * 12
    bea = running_gateway.client(running_gateway.key("bea", "tune"))
    form = {"files": {"file": ("rows.jsonl", content)}, "data": {"purpose": "fine-tune"}}
    file_id = bea.post("/v1/files", **form).json()["id"]
    kept = bea.get(f"/v1/files/{file_id}/content").content
    without_admin = [scope for scope in EVERY_SCOPE if scope is not Scope.ADMIN]
    others = [
        running_gateway.client(running_gateway.key("anna", "tune")),
        running_gateway.client(running_gateway.key("carl", *without_admin)),
        running_gateway.client(
            running_gateway.key("dora", *EVERY_SCOPE, deployments=["assistant"])
        ),
    ]
    for other in others:
        other.get("/v1/files")  # their people are made by their first request
    before = list_rows(running_gateway.database)
    routes = [route for route in ROUTES if "{file_id}" in route[1]]
    assert len(routes) == 3
    for other in others:
        for method, template in routes:
            reply = call(other, method, template.format(file_id=file_id))
            assert reply.status_code == 404, (method, template, reply.text)
        job = {"model": "assistant", "training_file": file_id}
        assert other.post("/v1/fine_tuning/jobs", json=job).status_code == 404
        assert other.get("/v1/files").json()["data"] == []
        assert other.get("/v1/files", params={"after": file_id}).status_code == 404
    assert list_rows(running_gateway.database) == before
    assert bea.get(f"/v1/files/{file_id}/content").content == kept
    figures(callers=len(others), routes=len(routes), found=0, changed=0)


def test_a_conversation_that_two_people_name_alike_is_two(running_gateway: RunningGateway) -> None:
    ids = []
    for user in ("anna", "bea"):
        client = running_gateway.client(running_gateway.key(user))
        body = {
            "model": "assistant",
            "messages": [{"role": "user", "content": "Hello"}],
            "metadata": {"conversation_id": "mine"},
        }
        ids.append(client.post("/v1/chat/completions", json=body).json()["id"])
    with running_gateway.database.read() as session:
        one, two = (session.get_one(Answer, answer_id) for answer_id in ids)
    assert one.conversation_id != two.conversation_id
    assert one.person_id != two.person_id
    assert (two.parent_id, two.regenerates_id) == (None, None)
