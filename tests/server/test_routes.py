"""All routes at once: who may call them, and that nobody reaches what is not theirs.

The tables below name every route of `auth.ROUTES`; one that is in none of them fails a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from sqlalchemy import select

from feedback.db import Base, Database
from feedback.tables import Answer
from server.app import create_app
from server.auth import PUBLIC, ROUTES, Scope, check_routes
from tests.gateway_fixtures import EVERY_SCOPE, RunningGateway
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

Route = tuple[str, str]

#: Routes about answers and verdicts, which belong to people.
PERSONAL = {
    ("GET", "/v1/chat/completions/{completion_id}"),
    ("POST", "/v1/chat/completions/{completion_id}"),
    ("DELETE", "/v1/chat/completions/{completion_id}"),
    ("GET", "/v1/chat/completions/{completion_id}/messages"),
    ("GET", "/v1/feedback/{judgement_id}"),
    ("DELETE", "/v1/feedback/{judgement_id}"),
}
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
    ("GET", "/metrics"),
    ("POST", "/admin/deployments"),
    ("POST", "/v1/files"),  # a form, of no deployment
}


@pytest.fixture
def foreign(running_gateway: RunningGateway) -> dict[str, str]:
    """Ids of everything that the deployment `poet` and its user Bea have, by parameter name."""
    database = running_gateway.database
    add_deployment(database, "poet")
    bea = running_gateway.client(running_gateway.key("bea"))
    answers = [
        add_answer(database, "bea", deployment="poet", text=f"Answer {number}.")
        for number in range(2)
    ]
    for number in range(8):
        answer = add_answer(database, "bea", deployment="poet", prompt=f"Bird {number}?")
        body = {"completion_id": answer, "kind": "correction", "value": f"It is a {number}."}
        bea.post("/v1/feedback", json=body)
    rating = {"completion_id": answers[0], "kind": "rating", "value": True}
    judgement = bea.post("/v1/feedback", json=rating).json()["id"]
    dataset = add_dataset(database, running_gateway.gateway.settings.data, "poet")
    adapter = build_adapter()
    release = add_candidate(database, "poet", adapter=adapter)
    evaluation = add_evaluation(database, release)
    with database.write() as session:
        job = create_tuning_job(
            session, get_deployment(session, "poet"), method="supervised", training_file=dataset.id
        )
    admin = running_gateway.client()
    key = admin.post("/admin/keys", json={"user": "bea", "scopes": ["chat"]}).json()["id"]
    files = admin.get(f"/admin/datasets/{dataset.id}").json()["files"]
    with database.read() as session:
        conversation_id = session.get_one(Answer, answers[0]).conversation_id
    return {
        "completion_id": answers[0],
        "other_id": answers[1],
        "conversation_id": conversation_id,
        "judgement_id": judgement,
        "name": "poet",
        "deployment": "poet",
        "model": "poet",
        "release": release,
        "adapter_id": adapter.id,
        "dataset_id": dataset.id,
        "file_id": files["supervised"],
        "evaluation_id": evaluation.id,
        "job_id": job.id,
        "key_id": key,
        "subject": release,
    }


def test_every_scope_opens_its_routes_and_no_other(sqlite_gateway: RunningGateway) -> None:
    keys = {scope: sqlite_gateway.key(f"user-{scope}", scope) for scope in EVERY_SCOPE}
    keys[Scope.INTERNAL] = sqlite_gateway.worker_key
    clients = {scope: sqlite_gateway.client(key) for scope, key in keys.items()}
    for (method, template), needed in ROUTES.items():
        path = re.sub(r"\{[^}]*\}", "nothing", template)
        for scope, client in clients.items():
            opens = (
                scope == needed
                or (scope is Scope.ADMIN and needed is not Scope.INTERNAL)
                or (scope is Scope.INTERNAL and needed is Scope.CHAT)  # for its evaluations
            )
            status = _call(client, method, path).status_code
            assert (status not in (401, 403)) is opens, (method, template, scope, status)
            assert status < 500, (method, template, scope, status)


def test_without_a_key_in_force_only_public_routes_answer(sqlite_gateway: RunningGateway) -> None:
    with httpx.Client(base_url=sqlite_gateway.url, trust_env=False) as nobody:
        for method, template in ROUTES:
            path = re.sub(r"\{[^}]*\}", "nothing", template)
            for authorization in ("", "Bearer sk-burnish-unknown", "Basic YTpi"):
                headers = {"authorization": authorization} if authorization else {}
                reply = nobody.request(method, path, headers=headers)
                assert reply.status_code == 401, (method, template)
                assert reply.json()["error"]["code"] == "invalid_api_key"
        for method, path in PUBLIC:
            assert nobody.request(method, path.split("{")[0]).status_code in (200, 404)


def test_a_route_without_a_scope_and_a_scope_without_a_route_stop_the_start(
    sqlite_gateway: RunningGateway,
) -> None:
    app = create_app(sqlite_gateway.gateway)
    router = APIRouter()
    router.add_api_route("/admin/secret", lambda: None)
    app.include_router(router)
    with pytest.raises(RuntimeError, match="/admin/secret"):
        check_routes(app.routes)
    with pytest.raises(RuntimeError, match="/v1/feedback"):
        check_routes(FastAPI().routes)


def test_the_tables_of_this_file_name_every_route() -> None:
    named = {*PERSONAL, *BODIES, *LISTS, *OF_NOBODY}
    by_path = {route for route in ROUTES if "{" in route[1]}
    internal = {route for route, scope in ROUTES.items() if scope is Scope.INTERNAL}
    assert named <= ROUTES.keys()
    assert named | by_path | internal == ROUTES.keys()


def test_somebody_elses_ids_are_unknown_and_nothing_happens(
    running_gateway: RunningGateway, foreign: dict[str, str]
) -> None:
    anna = running_gateway.client(running_gateway.key("anna"))
    shop = running_gateway.client(running_gateway.key("shop", "chat", "feedback", end_users=True))
    for client in (anna, shop):
        client.get("/admin/whoami")  # their people are made by their first request
    before = _everything(running_gateway.database)
    bodies = {
        ("POST", path): BODIES["POST", path]
        for path in ("/v1/feedback", "/v1/feedback/tokens", "/v1/comparisons")
    }
    for client in (anna, shop):
        for method, template in PERSONAL:
            body = {"metadata": {"a": "b"}} if method == "POST" else None
            reply = _call(client, method, template.format_map(foreign), body)
            assert reply.status_code == 404, (method, template, reply.text)
        for (method, path), build in bodies.items():
            for body in build(foreign):
                assert client.request(method, path, json=body).status_code == 404, body
        for path in ("/v1/feedback", "/v1/chat/completions"):
            assert client.get(path).json()["data"] == []
            reply = client.get(path, params={"after": foreign["judgement_id"]})
            assert reply.status_code == 404
    assert _everything(running_gateway.database) == before


def test_deployments_outside_the_keys_list_are_unknown_and_nothing_happens(
    running_gateway: RunningGateway, foreign: dict[str, str]
) -> None:
    key = running_gateway.key("max", *EVERY_SCOPE, deployments=["assistant"])
    limited = running_gateway.client(key)
    limited.get("/admin/whoami")
    before = _everything(running_gateway.database)
    by_path = [route for route, scope in ROUTES.items() if "{" in route[1] and scope != "internal"]
    for method, template in by_path:
        release = template.startswith("/admin/releases")
        ids = {**foreign, "name": foreign["release"]} if release else foreign
        path = template.replace(":path", "").format_map(ids)
        build = BODIES.get((method, template))
        for body in build(foreign) if build else [None]:
            reply = _call(limited, method, path, body)
            assert reply.status_code == 404, (method, path, reply.text)
    own = "/admin/deployments/assistant/promote"
    assert _call(limited, "POST", own, {"release": foreign["release"]}).status_code == 404
    for (method, template), build in BODIES.items():
        for body in build(foreign) if "{" not in template else []:
            reply = _call(limited, method, template, body)
            assert reply.status_code == 404, (method, template, body, reply.text)
    for (method, path), parameters in LISTS.items():
        shown = limited.request(method, path).text
        hidden = [name for name, value in foreign.items() if f'"{value}"' in shown]
        assert not hidden, (path, hidden)
        for name in parameters:
            given = {"deployment" if name == "deployment" else "after": foreign[name]}
            assert limited.get(path, params=given).status_code == 404, (path, given)
    assert _everything(running_gateway.database) == before


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


def test_a_name_with_a_nul_is_nobodys(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    for (method, template), scope in ROUTES.items():
        path = re.sub(r"\{[^}]*\}", "a%00b", template)
        if "{" in template and scope is not Scope.INTERNAL:
            status = _call(admin, method, path).status_code
            assert 400 <= status < 500, (method, template, status)
        elif method == "GET" and scope is not Scope.INTERNAL:
            assert admin.get(f"{path}?after=a%00b&kind=%00").status_code < 500, path


HOSTILE = {
    "a number that is none": b'{"deployment": "assistant", "wait_seconds": NaN}',
    "an infinite number": b'{"deployment": "assistant", "wait_seconds": 1e999}',
    "a huge integer": b'{"kind": "rating", "value": ' + b"9" * 5000 + b"}",
    "a huge generation": b'{"release": "assistant@0", "expected_generation": 99999999999999999999}',
    "depth": b'{"value": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "some depth": b'{"policies": {"curation": ' + b'{"a":' * 100 + b"1" + b"}" * 102,
    "NUL": rb'{"user": "a\u0000", "scopes": ["chat"], "value": {"a\u0000": 1}}',
    "half a pair": rb'{"user": "\ud800", "scopes": ["chat"], "value": ["\udfff"]}',
    "broken text": b'{"user": "\xff\xfe"}',
    "no object": b"[1]",
    "no JSON": b"user=anna",
    "too much": b'{"user": "' + b"x" * 1024 * 1024 + b'"}',
}


def test_hostile_bodies_are_refused_by_every_route_that_takes_one(
    running_gateway: RunningGateway,
) -> None:
    admin = running_gateway.client()
    written = [
        route
        for route in ROUTES
        if route[0] in ("POST", "PATCH") and not route[1].startswith("/internal")
    ]
    admin.get("/admin/whoami")  # the administrator's person is made by the first request
    before = _everything(running_gateway.database)
    for method, template in written:
        path = re.sub(r"\{[^}]*\}", "assistant", template)
        for name, content in HOSTILE.items():
            headers = {"content-type": "application/json"}
            reply = admin.request(method, path, content=content, headers=headers)
            assert 400 <= reply.status_code < 500, (path, name, reply.status_code)
            assert reply.json()["error"]["message"], (path, name)
            if name == "too much" and path != "/v1/files":  # which takes no JSON of any length
                assert reply.status_code == 413, path
    assert _everything(running_gateway.database) == before


def test_a_body_is_not_read_for_whom_it_is_not_for(sqlite_gateway: RunningGateway) -> None:
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    for content in HOSTILE.values():
        reply = anna.post("/admin/keys", content=content)
        assert reply.status_code == 403


def test_a_body_of_another_type_is_refused(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        content = b'{"user": "anna", "scopes": ["chat"]}'
        headers = {"content-type": kind} if kind else {}
        reply = admin.post("/admin/keys", content=content, headers=headers)
        assert reply.status_code == 400
        assert "application/json" in reply.json()["error"]["message"]


def test_the_description_names_every_public_route_and_the_shape_of_errors(
    sqlite_gateway: RunningGateway,
) -> None:
    with httpx.Client(base_url=sqlite_gateway.url, trust_env=False) as nobody:
        document = nobody.get("/openapi.json").json()
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    expected = {
        (method, path.replace(":path", ""))
        for (method, path), scope in ROUTES.items()
        if scope is not Scope.INTERNAL
    }
    assert described == expected | {("GET", "/healthz"), ("GET", "/readyz")}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            assert "422" not in operation["responses"], path
            errors = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert errors["required"] == ["error"], path


def _call(
    client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    writes = method in ("POST", "PATCH")
    return client.request(method, path, json=(body or {}) if writes else None)


def _everything(database: Database) -> dict[str, list[Any]]:
    """All rows of all tables."""
    with database.read() as session:
        return {
            table.name: sorted(map(repr, session.execute(select(table))))
            for table in Base.metadata.sorted_tables
        }
