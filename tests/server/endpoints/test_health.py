"""Is the process there, and can it answer?"""

from __future__ import annotations

import json

from server.engines.fake import FakeEngine
from tests.gateway_fixtures import RunningGateway


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
