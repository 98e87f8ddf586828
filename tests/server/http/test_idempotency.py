"""Requests under an `Idempotency-Key`: they run once, and say the same each time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from feedback.db import Database, now
from feedback.errors import BadRequest
from feedback.tables import AuditEntry, Judgement
from server.errors import StillRunning
from server.http import idempotency
from server.http.idempotency import Attempt, KeptReply, Watch, build_attempt
from server.tables import IdempotentRequest, Key
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer


class Clock:
    """Stands still until a test moves it."""

    at = 0.0

    def __call__(self) -> float:
        return self.at


def attempt(key: str = "k", body: bytes = b"{}", caller: str = "key_1") -> Attempt:
    return build_attempt(caller, key, "POST", "/admin/keys", body)


def begin(database: Database, one: Attempt, **more: Any) -> KeptReply | None:
    with database.write() as session:
        return idempotency.begin(session, one, **more)


def post(client: httpx.Client, path: str, body: dict[str, Any], key: str = "k-1") -> httpx.Response:
    return client.post(path, json=body, headers={"Idempotency-Key": key})


def test_the_first_copy_runs_and_the_next_ones_get_its_reply(database: Database) -> None:
    first = attempt()
    assert begin(database, first) is None
    with pytest.raises(StillRunning):
        begin(database, attempt())
    assert begin(database, attempt(caller="key_2")) is None  # keys of others are others
    with database.write() as session:
        idempotency.keep(
            session, first, KeptReply(201, {"id": "key_9", "key": "sk-burnish-secret"})
        )
    assert begin(database, attempt()) == KeptReply(201, {"id": "key_9", "key": None})
    with pytest.raises(BadRequest) as refused:
        begin(database, attempt(body=b"[]"))
    assert refused.value.code == "idempotency_mismatch"


def test_what_failed_and_what_is_a_day_old_runs_anew(database: Database) -> None:
    failed, old = attempt(), attempt("old")
    begin(database, failed)
    with database.write() as session:
        idempotency.give_up(session, failed)
    assert begin(database, attempt(body=b"[]")) is None

    begin(database, old, at=now() - timedelta(hours=25))
    with database.write() as session:
        idempotency.keep(session, old, KeptReply(200, {}))
    assert begin(database, attempt("another")) is None
    with database.read() as session:
        keys = set(session.scalars(select(IdempotentRequest.key)))
    assert keys == {"k", "another"}
    assert begin(database, attempt("old", body=b"[]")) is None


def test_a_request_without_a_sign_of_life_is_taken_over_and_writes_nothing_any_more(
    database: Database,
) -> None:
    dead, clock = attempt(), Clock()
    watch = Watch(monotonic=clock)
    begin(database, dead, watch=watch)
    with pytest.raises(BadRequest):
        begin(database, attempt(body=b"[]"), watch=watch)
    heir = attempt()
    for clock.at in (0.0, 59.9):
        with pytest.raises(StillRunning):
            begin(database, heir, watch=watch)
    clock.at = 60.0
    assert begin(database, heir, watch=watch) is None
    with database.write() as session:
        idempotency.keep(session, dead, KeptReply(200, "dead"))
        idempotency.give_up(session, dead)
        idempotency.keep(session, heir, KeptReply(200, "heir"))
    assert begin(database, attempt()) == KeptReply(200, "heir")


def test_a_beat_keeps_others_away(database: Database) -> None:
    slow, clock = attempt(), Clock()
    watch = Watch(monotonic=clock)
    begin(database, slow, watch=watch)
    for clock.at in (0.0, 60.0):
        with pytest.raises(StillRunning):
            begin(database, attempt(), watch=watch)
        with database.write() as session:
            idempotency.beat(session, slow)


def test_of_many_copies_at_once_one_runs(database: Database) -> None:
    start = threading.Barrier(8)

    def run(_number: int) -> bool:
        start.wait()
        try:
            return begin(database, attempt()) is None
        except StillRunning:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(run, range(8))) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "é"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(BadRequest):
        attempt(key)


def test_a_repeated_request_does_nothing_and_says_the_same(running_gateway: RunningGateway) -> None:
    answer = add_answer(running_gateway.database, "anna")
    anna = running_gateway.client(running_gateway.key("anna"))
    verdict = {"completion_id": answer, "kind": "rating", "value": True}

    first, again = (post(anna, "/v1/feedback", verdict) for _ in range(2))
    other = post(anna, "/v1/feedback", {**verdict, "value": False})

    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_mismatch")
    with running_gateway.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Judgement)) == 1


def test_a_new_key_is_made_once_and_never_stands_in_the_database(
    running_gateway: RunningGateway,
) -> None:
    admin = running_gateway.client()
    body = {"user": "anna", "scopes": ["chat"]}

    first, again = (post(admin, "/admin/keys", body) for _ in range(2))
    deleted = [
        admin.delete(f"/admin/keys/{first.json()['id']}", headers={"Idempotency-Key": "k-2"})
        for _ in range(2)
    ]

    assert again.json() == {**first.json(), "key": None}
    assert [reply.status_code for reply in deleted] == [200, 200]
    with running_gateway.database.read() as session:
        made = session.scalars(select(Key).where(Key.created_by == "admin")).all()
        rows = session.scalars(select(IdempotentRequest)).all()
        audited = session.scalars(select(AuditEntry.action).order_by(AuditEntry.seq)).all()
    assert len(made) == 1
    assert audited == ["key_created", "key_revoked"]
    assert first.json()["key"] not in repr([vars(row) for row in rows])


def test_a_refused_request_leaves_its_key_free(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    refused = post(admin, "/admin/keys", {"user": "", "scopes": ["chat"]})
    unknown = post(admin, "/v1/feedback", {"completion_id": "x", "kind": "rating", "value": True})
    assert (refused.status_code, unknown.status_code) == (400, 404)
    assert post(admin, "/admin/keys", {"user": "bo", "scopes": ["chat"]}).status_code == 201


def test_while_the_first_copy_runs_the_next_is_409(sqlite_gateway: RunningGateway) -> None:
    admin = sqlite_gateway.client()
    body = {"deployment": "assistant", "wait_seconds": 30}
    replies: list[httpx.Response] = []
    slow = threading.Thread(
        target=lambda: replies.append(post(admin, "/admin/datasets", {**body, "wait_seconds": 2}))
    )
    slow.start()
    waiting = threading.Event()
    for _ in range(200):
        with sqlite_gateway.database.read() as session:
            if session.scalar(select(IdempotentRequest.key)) is not None:
                break
        waiting.wait(0.01)
    second = post(sqlite_gateway.client(), "/admin/datasets", {**body, "wait_seconds": 2})
    slow.join()
    assert (second.status_code, second.headers["retry-after"]) == (409, "1")
    assert second.json()["error"]["code"] == "idempotency_running"
    assert replies[0].status_code == 202
    third = post(admin, "/admin/datasets", {**body, "wait_seconds": 2})
    assert third.json() == replies[0].json()


def test_a_deleted_answer_takes_kept_replies_about_it_along(
    running_gateway: RunningGateway,
) -> None:
    client = running_gateway.client(running_gateway.key("anna"))
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    gone, stays = (client.post("/v1/chat/completions", json=body).json()["id"] for _ in range(2))
    for number, completion_id in enumerate((gone, stays)):
        said = {"completion_id": completion_id, "kind": "comment", "value": "my canary"}
        headers = {"idempotency-key": f"k{number}"}
        assert client.post("/v1/feedback", json=said, headers=headers).status_code == 201
    assert client.delete(f"/v1/chat/completions/{gone}").status_code == 200
    with running_gateway.database.read() as session:
        kept = [row.reply["completion_id"] for row in session.scalars(select(IdempotentRequest))]
    assert kept == [stays]
