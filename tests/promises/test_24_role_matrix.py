"""Promise 24: which scope opens which route, for every route and every scope, from one table."""

from __future__ import annotations

import re

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Route

from server.access.scopes import PUBLIC, ROUTES, TOKEN_ROUTES, Scope, check_routes
from server.app import create_app
from tests.everything import add_everything, call, list_rows
from tests.gateway_fixtures import EVERY_SCOPE, RunningGateway
from tests.promise_fixtures import Figures
from tests.rows import add_answer

pytestmark = pytest.mark.promises


def opens(scope: Scope, needed: Scope) -> bool:
    """`admin` holds every scope but the worker's; the worker may chat, for its evaluations."""
    if scope is Scope.ADMIN:
        return needed is not Scope.INTERNAL
    return scope is needed or (scope, needed) == (Scope.INTERNAL, Scope.CHAT)


def clients_by_scope(running: RunningGateway) -> dict[Scope, httpx.Client]:
    """For each scope somebody who has it alone."""
    keys = {scope: running.key(f"user-{scope}", scope) for scope in EVERY_SCOPE}
    keys[Scope.INTERNAL] = running.worker_key
    return {scope: running.client(key) for scope, key in keys.items()}


def test_every_scope_opens_its_routes_and_no_other(
    sqlite_gateway: RunningGateway, figures: Figures
) -> None:
    clients, asked = clients_by_scope(sqlite_gateway), 0
    for (method, template), needed in ROUTES.items():
        path = re.sub(r"\{[^}]*\}", "nothing", template)
        for scope, client in clients.items():
            status = call(client, method, path).status_code
            assert (status not in (401, 403)) is opens(scope, needed), (method, path, scope, status)
            assert status < 500, (method, path, scope, status)
            asked += 1
    assert asked == len(ROUTES) * len(Scope)
    figures(routes=len(ROUTES), scopes=len(Scope), other_than_in_the_table=0)


def test_what_a_scope_does_not_open_changes_nothing(
    sqlite_gateway: RunningGateway, figures: Figures
) -> None:
    ids = add_everything(sqlite_gateway, "poet", "bea")
    clients = clients_by_scope(sqlite_gateway)
    before = list_rows(sqlite_gateway.database)
    refused = 0
    for (method, template), needed in ROUTES.items():
        release = template.startswith("/admin/releases")
        given = {**ids, "token": "slot_1", "name": ids["release"] if release else ids["name"]}
        path = template.replace(":path", "").format_map(given)
        for scope, client in clients.items():
            if not opens(scope, needed):
                reply = call(client, method, path)
                assert reply.status_code == 403, (method, path, scope)
                assert reply.json()["error"]["code"] == "insufficient_scope"
                refused += 1
    assert refused > len(ROUTES) * 4
    assert list_rows(sqlite_gateway.database) == before
    figures(refused=refused, changed=0)


def test_a_feedback_token_opens_its_two_routes_and_no_other(sqlite_gateway: RunningGateway) -> None:
    bea = sqlite_gateway.client(sqlite_gateway.key("bea"))
    for number, (method, template) in enumerate(ROUTES):
        if number % 20 == 0:  # those of one answer may ask 30 times a minute
            answer = add_answer(sqlite_gateway.database, "bea")
            body = {"completion_id": answer, "expires_in_seconds": 60}
            made = bea.post("/v1/feedback/tokens", json=body).json()
            token = sqlite_gateway.client(made["token"])
        path = re.sub(r"\{[^}]*\}", "nothing", template)
        status = call(token, method, path).status_code
        assert (status != 403) is ((method, template) in TOKEN_ROUTES), (method, path, status)
        assert status < 500, (method, path, status)


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


def test_every_route_stands_in_the_table_or_is_one_of_five(sqlite_gateway: RunningGateway) -> None:
    routes = create_app(sqlite_gateway.gateway).routes
    found = {
        (method, route.path)
        for route in routes
        if isinstance(route, Route)
        for method in route.methods or ()
    } - {("HEAD", "/openapi.json")}
    assert found == ROUTES.keys() | PUBLIC
    assert len(found) == len(ROUTES) + 5
    assert all(isinstance(route, Route) for route in routes)  # no mounts, no sockets


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
