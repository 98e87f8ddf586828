"""A gateway's start and end."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from feedback.db import Database, DatabaseUnfit
from feedback.tables import Answer
from server.gateway import sole_gateway
from tests.fake_engine import FakeEngine
from tests.gateway_fixtures import RunningGateway, start_gateway

CHAT = "/v1/chat/completions"
BODY = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}


def test_a_second_gateway_on_one_sqlite_file_is_refused(sqlite_database: Database) -> None:
    with (
        sole_gateway(sqlite_database),
        pytest.raises(DatabaseUnfit, match=r"another gateway \(process \d+\)"),
        sole_gateway(sqlite_database),
    ):
        pytest.fail("two gateways at once")
    with sole_gateway(sqlite_database):
        pass


def test_answers_that_a_killed_gateway_left_are_ended_at_the_next_start(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    engines = [gateway_engine.address]
    with start_gateway(sqlite_database, tmp_path / "data", engines) as gateway:
        answer_id = gateway.client(gateway.key("anna")).post(CHAT, json=BODY).json()["id"]
    with sqlite_database.write() as session:
        session.get_one(Answer, answer_id).status = "started"
    with start_gateway(sqlite_database, tmp_path / "data", engines), sqlite_database.read() as s:
        answer = s.scalars(select(Answer)).one()
        assert (answer.status, answer.error_code) == ("interrupted", "gateway_stopped")


def test_a_key_that_was_revoked_is_out_of_force_at_the_next_refresh(
    sqlite_gateway: RunningGateway,
) -> None:
    from server.access.keyring import hash_key
    from server.access.keys import revoke_key
    from server.tables import Key

    key = sqlite_gateway.key("anna")
    client = sqlite_gateway.client(key)
    assert client.get("/v1/models").status_code == 200
    with sqlite_gateway.database.write() as session:
        found = session.scalars(select(Key).where(Key.sha256 == hash_key(key))).one()
        revoke_key(session, found.id)
    sqlite_gateway.refresh()
    assert client.get("/v1/models").status_code == 401


def test_a_person_who_is_known_is_found_while_the_database_is_locked(
    sqlite_gateway: RunningGateway,
) -> None:
    find = sqlite_gateway.gateway.callers._find_or_create
    found = find("anna", "")
    with sqlite_gateway.database.write() as session:
        session.connection()  # BEGIN IMMEDIATE
        assert find("anna", "") == found
