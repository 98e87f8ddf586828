"""A request's id: on every reply, in every line logged for it, and never the caller's."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feedback.db import Database
from server.http.request_ids import describe_request, get_request_id
from server.logs import JsonFormatter
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import MAX_LORAS, RunningGateway, start_gateway

ORIGIN = "https://chat.example.com"
ASK = {"model": "assistant", "messages": [{"role": "user", "content": "Hi"}]}


class Lines(io.StringIO):
    """What was logged, as it is written to standard error."""

    def of(self, action: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.getvalue().splitlines()]
        return [line for line in lines if line.get("action") == action]


@pytest.fixture
def lines() -> Iterator[Lines]:
    found = Lines()
    handler = logging.StreamHandler(found)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    yield found
    root.removeHandler(handler)


def test_every_reply_has_an_id_of_its_own(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client()
    asked: list[tuple[str, str, Any, int]] = [
        ("GET", "/", None, 200),
        ("GET", "/healthz", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/admin/releases", None, 200),
        ("GET", "/nowhere", None, 404),
        ("PUT", "/v1/models", None, 405),
        ("POST", "/v1/feedback", {"kind": 1}, 400),
        ("POST", "/v1/chat/completions", ASK, 200),
        ("POST", "/v1/chat/completions", {**ASK, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {**ASK, "model": "nobody"}, 404),
        ("POST", "/v1/completions", {"model": "assistant", "prompt": "Hi"}, 200),
    ]
    seen = set()
    for method, path, body, status in asked:
        reply = client.request(method, path, json=body)
        assert reply.status_code == status, (method, path)
        assert reply.headers.get_list("x-request-id") == [reply.headers["x-request-id"]]
        assert len(reply.headers["x-request-id"]) == 26
        seen.add(reply.headers["x-request-id"])
    assert len(seen) == len(asked)


def test_the_callers_id_is_logged_and_never_taken(
    sqlite_gateway: RunningGateway, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        logging.getLogger("test").warning("Looking", extra={"action": "looking"})
        assert threading.current_thread() is not threading.main_thread()
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr("server.endpoints.jobs.list_jobs", fail)
    client = sqlite_gateway.client()
    theirs = "chatcmpl-01h2xcejqtf2nbrexx3vqjhp41"
    for headers, told in (
        ({}, None),
        ({"x-request-id": theirs}, theirs),
        ({"x-request-id": theirs, "x-client-request-id": "mine"}, "mine"),
        ({"x-request-id": "a b"}, None),
        ({"x-request-id": "x" * 129}, None),
        ({"x-request-id": "été".encode("latin-1")}, None),
    ):
        reply = client.get("/admin/jobs", headers=headers)
        assert reply.status_code == 500
        for action in ("looking", "request_failed"):  # in the route's thread, and in the loop
            line = lines.of(action)[-1]
            assert line["request_id"] == reply.headers["x-request-id"]
            assert line["request_id"] not in (theirs, told)
            assert line.get("caller_request_id") == told


def test_a_fault_that_nobody_foresaw_is_a_reply_like_any_other(
    sqlite_database: Database,
    gateway_engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("the colour of my door")

    monkeypatch.setattr("server.endpoints.jobs.list_jobs", fail)
    addresses, options = [gateway_engine.address], {"cors_origins": [ORIGIN]}
    with start_gateway(sqlite_database, tmp_path / "data", addresses, **options) as running:
        client = running.client()
        reply = client.get("/admin/jobs", headers={"origin": ORIGIN})
        counted = 'burnish_requests_total{route="/admin/jobs",status="500"} 1'
        assert counted in client.get("/metrics").text
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "colour" not in reply.text
    assert len(reply.headers["x-request-id"]) == 26
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["access-control-allow-origin"] == ORIGIN


def test_an_answer_has_the_id_of_its_request(
    sqlite_database: Database, lines: Lines, tmp_path: Path
) -> None:
    with (
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as bad,
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as good,
        start_gateway(sqlite_database, tmp_path / "data", [bad.address, good.address]) as running,
    ):
        running.reconcile()
        bad.faults = Faults(error_status=500)
        headers = {"x-request-id": "theirs"}
        reply = running.client().post("/v1/chat/completions", json=ASK, headers=headers)
        number = reply.headers["x-request-id"]
        assert reply.json()["id"] == f"chatcmpl-{number}"
    (line,) = lines.of("answer_retried")
    assert (line["request_id"], line["caller_request_id"]) == (number, "theirs")
    # No word of the engine's, which might repeat the prompt.
    assert (line["code"], line["status"], line.get("error")) == ("engine_error", 502, None)


def test_requests_at_once_keep_their_ids_apart(
    sqlite_gateway: RunningGateway, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)

    def look(*_arguments: Any, **_options: Any) -> tuple[list[Any], bool]:
        together.wait(10)
        logging.getLogger("test").warning("Looking", extra={"action": "looking"})
        return [], False

    monkeypatch.setattr("server.endpoints.jobs.list_jobs", look)
    replied: dict[str, str] = {}

    def ask(name: str) -> None:
        reply = sqlite_gateway.client().get("/admin/jobs", headers={"x-request-id": name})
        replied[name] = reply.headers["x-request-id"]

    threads = [threading.Thread(target=ask, args=(f"caller-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = {line["caller_request_id"]: line["request_id"] for line in lines.of("looking")}
    assert told == replied
    assert len(set(told.values())) == 4


def test_outside_of_requests_there_is_no_id(lines: Lines) -> None:
    logging.getLogger("test").warning("Idle", extra={"action": "idle"})
    assert "request_id" not in lines.of("idle")[0]
    assert describe_request() == {}
    with pytest.raises(LookupError):
        get_request_id()
