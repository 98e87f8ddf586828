"""Whether the process is there, and whether it can answer."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from feedback.db import Database
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import BASE, RunningGateway, start_gateway


def test_readiness_follows_the_engine_and_says_why_not(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    client = sqlite_gateway.client()
    del client.headers["authorization"]
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    gateway_engine.dead = True
    sqlite_gateway.reconcile()
    failed = client.get("/readyz")
    assert (failed.status_code, failed.json()["status"]) == (503, "failed")
    assert "health check: /health answers 503" in failed.json()["reason"]
    assert failed.headers["retry-after"] == "5"
    state = {"children": {"engine": {"state": "backoff", "reason": "exit 1"}}}
    run_dir = sqlite_gateway.gateway.settings.run_dir
    (run_dir / "supervisor.json").write_text(json.dumps(state))
    assert "exit 1" in client.get("/readyz").json()["reason"]
    gateway_engine.dead = False
    sqlite_gateway.reconcile()
    assert client.get("/readyz").status_code == 200


def test_a_gateway_that_stops_is_alive_and_not_ready_and_takes_no_new_question(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    sqlite_gateway.gateway.stopping = True
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").json()["status"] == "stopping"
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")


def test_neither_readiness_nor_errors_name_an_engine_s_address(
    sqlite_database: Database, tmp_path: Path
) -> None:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    with ExitStack() as stack:
        engine = stack.enter_context(ExitStack())
        fake = engine.enter_context(FakeEngine(model=BASE.name, api_key="secret", max_loras=4))
        gateway = stack.enter_context(
            start_gateway(sqlite_database, tmp_path / "data", [fake.address])
        )
        client, place = gateway.client(), urlsplit(fake.url)
        engine.close()
        said = [client.post("/v1/chat/completions", json=body)]  # it finds out
        gateway.reconcile()
        said += [client.post("/v1/chat/completions", json=body), client.get("/readyz")]
        run_dir = gateway.gateway.settings.run_dir
        for reason in (f"port {place.netloc} is taken", f"no answer from {fake.url}/health"):
            state = {"children": {"engine": {"state": "backoff", "reason": reason}}}
            (run_dir / "supervisor.json").write_text(json.dumps(state))
            said.append(client.get("/readyz"))
    for reply in said:
        assert reply.status_code == 503
        assert str(place.hostname) not in reply.text
        assert str(place.port) not in reply.text
    assert "engine-0" in said[2].text


def test_an_engine_that_reads_chats_otherwise_than_the_base_gets_none(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    client = sqlite_gateway.client()
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    for name, other, reason in (
        ("default_system", "Be kind.", "engine-0 is failed: it renders chats by another template"),
        ("max_model_len", 1023, "it reads at most 1023 tokens, and 1024 are counted on"),
    ):
        before = getattr(gateway_engine, name)
        for value, status in ((other, 503), (before, 200)):
            setattr(gateway_engine, name, value)
            gateway_engine.restart()
            sqlite_gateway.reconcile()
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == client.get("/readyz").status_code == status
            assert (reason in reply.text) is (status == 503)


def test_an_engine_that_cannot_tell_how_it_renders_is_let_through_with_a_warning(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    gateway_engine.faults = Faults(lacks_tokenize=True)
    gateway_engine.restart()
    for _ in range(3):
        sqlite_gateway.reconcile()
    assert sqlite_gateway.client().get("/readyz").status_code == 200
    said = [one for one in caplog.records if vars(one).get("action") == "template_not_checked"]
    assert [one.levelname for one in said] == ["WARNING"]
