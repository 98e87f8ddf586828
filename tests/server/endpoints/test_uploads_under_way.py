"""Uploads under way: quotas, their number, and clients that go away."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from feedback.db import Database
from feedback.tables import File
from server.http.intake import MOST_OF_ONE_USER
from tests.fake_engine import FakeEngine
from tests.gateway_fixtures import RunningGateway, start_gateway

ROW = b'{"prompt": "Which bird?", "completion": "A heron."}\n'
LONG = ROW + b"\n" * 30_000_000
"""Nothing is wrong with blank lines, and reading them takes seconds."""

PURPOSE = {"purpose": "fine-tune"}


def send(client: httpx.Client, content: bytes = ROW, **fields: str) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("b", content)}, data={**PURPOSE, **fields})


def until(happens: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # the reader is another process: there is no event


def folders(running: RunningGateway) -> list[Path]:
    home = running.gateway.settings.data / "files"
    return sorted(home.iterdir()) if home.exists() else []


def begin_upload(running: RunningGateway, key: str, content: bytes, more: int) -> socket.socket:
    """A connection on which a form with `content` is sent, all but `more` bytes of its body."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    tail = (
        b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'
    )
    body = head + content + tail
    request = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", running.gateway.settings.port), timeout=30)
    connection.sendall(request.encode() + body[: len(body) - more])
    return connection


def test_a_quota_counts_files_of_all_keys_of_a_user_and_a_deletion_makes_room(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    address = [gateway_engine.address]
    with start_gateway(sqlite_database, tmp_path, address, max_stored_uploads=2) as running:
        first, second = (running.client(running.key("tu", "tune")) for _ in range(2))
        kept = [send(client).raise_for_status().json()["id"] for client in (first, second)]
        refused = send(first)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "upload_quota")
        message = refused.json()["error"]["message"]
        assert "'tu' keeps 2 uploads, and the limit is 2 (gateway.max_stored_uploads)" in message
        assert "DELETE /v1/files/{file_id}" in message
        assert len(folders(running)) == 2
        assert send(running.client(running.key("other", "tune"))).status_code == 200
        assert first.delete(f"/v1/files/{kept[0]}").status_code == 200
        assert send(second).status_code == 200


def test_a_quota_counts_bytes_and_an_applications_end_users_together(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    address = [gateway_engine.address]
    with start_gateway(
        sqlite_database, tmp_path, address, max_stored_upload_bytes=2_000
    ) as running:
        client = running.client(running.key("app", "tune", end_users=True))
        size = 0
        for end_user in ("ann", "bob", "cem"):
            client.headers["X-OpenWebUI-User-Id"] = end_user
            reply = send(client, ROW * 5)
            if reply.status_code != 200:
                break
            size += reply.json()["bytes"]
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "upload_quota")
        message = reply.json()["error"]["message"]
        assert f"the uploads of 'app' come to {size} bytes, and this file comes to" in message
        assert "the limit is 2000 (gateway.max_stored_upload_bytes)" in message
        assert all(not folder.name.endswith(".partial") for folder in folders(running))


def test_uploads_at_the_same_time_do_not_pass_the_quota_together(
    database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    address = [gateway_engine.address]
    with start_gateway(database, tmp_path, address, max_stored_uploads=1) as running:
        clients = [running.client(running.key("tu", "tune")) for _ in range(MOST_OF_ONE_USER)]
        with ThreadPoolExecutor(len(clients)) as pool:
            statuses = sorted(reply.status_code for reply in pool.map(send, clients))
        assert statuses == [200] + [400] * (MOST_OF_ONE_USER - 1)
        with database.read() as session:
            assert session.query(File).count() == len(folders(running)) == 1


def test_expires_after_is_named_as_ignored_and_refused_where_strict(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    for strict in (False, True):
        engines = [gateway_engine.address]
        with start_gateway(sqlite_database, tmp_path, engines, strict=strict) as running:
            where = {"base_url": f"{running.url}/v1", "api_key": running.admin_key}
            with openai.OpenAI(**where) as client:
                files = client.files.with_raw_response
                options: Any = {"file": ("b", ROW), "expires_after": expiry, **PURPOSE}
                if strict:
                    with pytest.raises(openai.BadRequestError, match="kept until it is deleted"):
                        files.create(**options)
                else:
                    reply = files.create(**options)
                    assert reply.headers["x-burnish-ignored"] == "expires_after"


def test_one_user_has_few_uploads_under_way_and_others_are_not_kept_waiting(
    sqlite_gateway: RunningGateway,
) -> None:
    key = sqlite_gateway.key("tu", "tune")
    with ExitStack() as stack:
        for _ in range(MOST_OF_ONE_USER):
            stack.enter_context(begin_upload(sqlite_gateway, key, ROW, more=10))
        until(lambda: len(folders(sqlite_gateway)) == MOST_OF_ONE_USER)
        refused = send(sqlite_gateway.client(key))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert "has 4 uploads under way" in refused.json()["error"]["message"]
        other = sqlite_gateway.client(sqlite_gateway.key("other", "tune"))
        assert send(other).status_code == 200
    until(lambda: send(sqlite_gateway.client(key)).status_code == 200)


def test_reading_ends_when_the_client_goes_away(sqlite_gateway: RunningGateway) -> None:
    connection = begin_upload(sqlite_gateway, sqlite_gateway.admin_key, LONG, more=0)
    until(lambda: any((folder / "rows.jsonl").exists() for folder in folders(sqlite_gateway)))
    connection.close()
    until(lambda: not folders(sqlite_gateway))
    assert sqlite_gateway.client().get("/v1/files").json()["data"] == []


def test_a_file_that_ends_its_reader_is_refused_with_the_limit(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    engines = [gateway_engine.address]
    with start_gateway(sqlite_database, tmp_path, engines, upload_timeout_seconds=1) as running:
        refused = send(running.client(), LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_large")
        assert "1 seconds (gateway.upload_timeout_seconds)" in refused.json()["error"]["message"]
        assert folders(running) == []


def test_the_order_of_keys_is_kept_in_what_is_handed_out(sqlite_gateway: RunningGateway) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"z": 1, "a": 2}}}
    row = {**json.loads(ROW), "tools": [tool]}
    client = sqlite_gateway.client()
    file_id = send(client, json.dumps(row).encode()).json()["id"]
    (kept,) = client.get(f"/v1/files/{file_id}/content").text.splitlines()
    assert json.dumps(json.loads(kept)["tools"]) == json.dumps([tool])
