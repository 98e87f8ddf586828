"""Keys, scopes, end users."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from feedback.db import Database
from feedback.errors import BadRequest, Forbidden, NotAuthenticated, NotFound
from server.access.keyring import KeyView, check_scope, end_user_of, load_keyring
from server.access.keys import KEY_PREFIX, create_key, revoke_key
from server.access.scopes import PUBLIC, ROUTES, Scope, check_routes
from server.tables import Key


def view(*scopes: str, end_users: bool = False) -> KeyView:
    return KeyView("key_1", "0" * 64, "anna", frozenset(scopes), None, end_users)


def test_a_key_is_kept_as_a_hash_and_recognised_until_it_is_revoked(database: Database) -> None:
    with database.write() as session:
        row, token = create_key(session, user="anna", scopes=["chat"])
    assert token.startswith(KEY_PREFIX)
    assert token not in str(vars(row))
    with database.read() as session:
        ring = load_keyring(session)
    assert ring.authenticate(f"Bearer {token}").user == "anna"
    for wrong in (None, "", token, f"Basic {token}", "Bearer ", f"Bearer {token}x", "Bearer é"):
        with pytest.raises(NotAuthenticated):
            ring.authenticate(wrong)
    with database.write() as session:
        revoke_key(session, row.id)
    with database.read() as session, pytest.raises(NotAuthenticated):
        load_keyring(session).authenticate(f"Bearer {token}")
    with database.write() as session, pytest.raises(NotFound):
        revoke_key(session, row.id)


def test_the_worker_s_key_cannot_be_revoked_by_its_id(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        row, _ = create_key(session, user="worker", scopes=[Scope.INTERNAL])
        with pytest.raises(NotFound):
            revoke_key(session, row.id)
        assert session.get_one(Key, row.id).revoked_at is None


def test_an_unknown_scope_is_refused(sqlite_database: Database) -> None:
    with sqlite_database.write() as session, pytest.raises(BadRequest, match="known scopes: chat"):
        create_key(session, user="anna", scopes=["chat", "root"])


@pytest.mark.parametrize(("route", "scope"), sorted(ROUTES.items()))
def test_a_route_takes_its_scope_or_admin_and_chat_the_worker_s_too(
    route: tuple[str, str], scope: Scope
) -> None:
    for held in Scope:
        allowed = held is scope or (held, scope) == (Scope.INTERNAL, Scope.CHAT)
        allowed = allowed or (held is Scope.ADMIN and scope is not Scope.INTERNAL)
        if allowed:
            check_scope(view(held), *route)
        else:
            with pytest.raises(Forbidden):
                check_scope(view(held), *route)


def test_a_route_without_a_scope_stops_the_start() -> None:
    app = FastAPI(docs_url=None, redoc_url=None)
    for method, path in [*ROUTES, *PUBLIC - {("GET", "/openapi.json")}]:
        app.add_api_route(path, lambda: None, methods=[method])
    check_routes(app.routes)
    app.add_api_route("/admin/backdoor", lambda: None)
    with pytest.raises(RuntimeError, match="/admin/backdoor"):
        check_routes(app.routes)


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({"user": 5}, {}, "anonymous"),
        ({"user": ""}, {}, "anonymous"),
        ({"metadata": "x", "user": "u"}, {}, "u"),
        ({"metadata": {"user_id": "m"}}, {"x-user": "h"}, "m"),
        ({}, {"x-user": "h"}, "h"),
    ],
)
def test_the_end_user_is_the_first_name_that_is_one(
    body: dict[str, Any], headers: dict[str, str], expected: str
) -> None:
    assert end_user_of(view(end_users=True), body, headers, ["X-User"]) == expected
    assert end_user_of(view(), body, headers, ["X-User"]) == ""
    by_header = replace(view(end_users=True), header_only=True)
    assert end_user_of(by_header, body, headers, ["X-User"]) == headers.get("x-user", "anonymous")


@pytest.mark.parametrize("name", ["x" * 257, "a\x00b"])
def test_a_name_that_no_database_takes_is_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        end_user_of(view(end_users=True), {"user": name}, {}, [])
