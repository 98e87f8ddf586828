"""All routes at once: what no route takes, and what their description says.

Who may call them is in `tests/promises/test_23_…` and `test_24_…`.
"""

from __future__ import annotations

import json
import re

import httpx

from server.access.scopes import ROUTES, Scope
from tests.everything import call, list_rows
from tests.gateway_fixtures import RunningGateway


def test_a_name_with_a_nul_is_nobodys(running_gateway: RunningGateway) -> None:
    admin = running_gateway.client()
    for (method, template), scope in ROUTES.items():
        path = re.sub(r"\{[^}]*\}", "a%00b", template)
        if "{" in template and scope is not Scope.INTERNAL:
            status = call(admin, method, path).status_code
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
    before = list_rows(running_gateway.database)
    for method, template in written:
        path = re.sub(r"\{[^}]*\}", "assistant", template)
        for name, content in HOSTILE.items():
            headers = {"content-type": "application/json"}
            reply = admin.request(method, path, content=content, headers=headers)
            assert 400 <= reply.status_code < 500, (path, name, reply.status_code)
            assert reply.json()["error"]["message"], (path, name)
            if name == "too much" and path != "/v1/files":  # which takes no JSON of any length
                assert reply.status_code == 413, path
    assert list_rows(running_gateway.database) == before


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


def test_the_description_names_every_public_route_and_the_shapes_of_its_replies(
    sqlite_gateway: RunningGateway,
) -> None:
    with httpx.Client(base_url=sqlite_gateway.url, trust_env=False) as nobody:
        document = nobody.get("/openapi.json").json()
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    keyed = {
        (method, path.replace(":path", ""))
        for (method, path), scope in ROUTES.items()
        if scope is not Scope.INTERNAL
    }
    assert described == keyed | {("GET", "/healthz"), ("GET", "/readyz")}
    shapes = document["components"]["schemas"]
    assert shapes["ErrorReply"]["required"] == ["error"]
    assert shapes["ErrorObject"]["required"] == ["message", "type", "param", "code"]
    for name, shape in shapes.items():
        ours = re.search(r"`(feedback|server|tuner|wire)\.", shape.get("description", ""))
        assert ours is None, f"{name} names a module of ours to those who call"
    envelope = {"$ref": "#/components/schemas/ErrorReply"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], path
            is_keyed = (method.upper(), path) in keyed
            assert ("security" in operation) is is_keyed, path
            replies = operation["responses"]
            assert {"401", "403", "429", "503"} <= replies.keys() or not is_keyed
            assert "422" not in replies, path
            for status, reply in replies.items():
                for kind, content in reply["content"].items():
                    if status >= "400" and path != "/readyz":
                        assert (kind, content["schema"]) == ("application/json", envelope), path
                    elif kind == "application/json":
                        assert "$ref" in json.dumps(content["schema"]), (path, status)


def test_a_wrong_method_is_told_which_are_right(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    for path, allowed in {
        "/v1/files": "GET, HEAD, OPTIONS, POST",
        "/v1/feedback": "GET, HEAD, OPTIONS, POST",
        "/v1/feedback/tokens": "OPTIONS, POST",
        "/v1/feedback/fb_1": "DELETE, GET, HEAD, OPTIONS",
        "/admin/deployments/assistant": "GET, HEAD, OPTIONS, PATCH",
        "/healthz": "GET, HEAD, OPTIONS",
    }.items():
        reply = admin.put(path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed), path
        assert reply.json()["error"]["code"] == "method_not_allowed"


def test_values_of_another_type_are_not_made_to_fit(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    for method, path, body in (
        ("PATCH", "/admin/deployments/assistant", {"sampling": {"seed": False}}),
        ("PATCH", "/admin/deployments/assistant", {"sampling": {"temperature": "1"}}),
        ("POST", "/admin/datasets", {"deployment": "assistant", "wait_seconds": "0"}),
        ("POST", "/admin/keys", {"user": "x", "scopes": ["chat"], "end_users": "yes"}),
        ("POST", "/admin/deployments/assistant/promote", {"release": "assistant@0", "force": 1}),
    ):
        reply = admin.request(method, path, json=body)
        assert reply.status_code == 400, (path, body, reply.text)


def test_every_route_takes_whole_numbers_written_with_a_point(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    question = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    first, second = (
        client.post("/v1/chat/completions", json={**question, "max_tokens": 8.0}).json()["id"]
        for _ in range(2)
    )
    verdict = {"completion_id": first, "kind": "stars"}
    compared = {"completion_ids": [first, second], "preferred": "a"}
    curation = {"curation": {"stars_true": 5.0}}
    asked = (
        ("POST", "/v1/feedback", {**verdict, "value": 4.0, "choice_index": 0.0}),
        ("POST", "/v1/feedback/tokens", {"completion_id": first, "expires_in_seconds": 60.0}),
        ("POST", "/v1/comparisons", {**compared, "choice_indexes": [0.0, 0.0]}),
        ("PATCH", "/admin/deployments/assistant", {"policies": curation}),
        ("PATCH", "/admin/deployments/assistant", {"sampling": {"max_tokens": 64.0}}),
        (
            "POST",
            "/admin/keys",
            {"user": "a", "scopes": ["chat"], "limits": {"requests_per_minute": 60.0}},
        ),
    )
    for method, path, body in asked:
        reply = client.request(method, path, json=body)
        assert reply.is_success, (path, reply.text)
    stars = client.get(f"/v1/feedback?completion_id={first}&kind=stars").json()["data"][0]["value"]
    assert (stars, type(stars)) == (4, int)
    for value in (4.5, "4"):
        reply = client.post("/v1/feedback", json={**verdict, "value": value})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "value")
    patch = {"sampling": {"max_tokens": -1}}
    refused = client.patch("/admin/deployments/assistant", json=patch).json()["error"]
    assert refused["message"].endswith("leave it out for no limit")
