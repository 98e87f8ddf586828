"""The gateway as a process: how it ends, and what every reply has."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from sqlalchemy import select

from feedback.db import Database
from feedback.tables import Answer
from server.app import build_config, create_app
from server.auth import create_key
from server.engines.fake import FakeEngine
from server.settings import GatewaySettings, ModelSettings, Settings
from server.upgrade import upgrade
from tests.gateway_fixtures import RunningGateway, start_gateway
from tests.promises.processes import build_model, engine_process, gateway_process


def test_sigterm_lets_streams_finish_and_exits_with_0(tmp_path: Path) -> None:
    base = build_model(tmp_path / "tiny")
    settings = Settings(data=tmp_path / "data", model=ModelSettings(path=str(base.path)))
    settings.data.mkdir()
    database = Database(settings.database_url)
    upgrade(settings, database, base, url="http://127.0.0.1")
    with database.write() as session:
        _, key = create_key(session, user="anna", scopes=["chat"])
    lines: list[str] = []
    first = threading.Event()

    def read(url: str) -> None:
        body = {
            "model": "assistant",
            "stream": True,
            "messages": [{"role": "user", "content": "hi"}],
        }
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(trust_env=False, headers=headers) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply,
        ):
            for line in reply.iter_lines():
                lines.append(line)
                first.set()

    with (
        engine_process() as engine,
        gateway_process(settings.data, base.path, engine, tmp_path / "log") as gateway,
    ):
        httpx.post(f"{engine}/fake/faults", json={"token_seconds": 0.02}, trust_env=False)
        reader = threading.Thread(target=read, args=(gateway.url,))
        reader.start()
        assert first.wait(10)
        assert gateway.terminate() == 0
        reader.join()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    with database.read() as session:
        assert session.scalars(select(Answer.status)).all() == ["complete"]
    database.dispose()


def test_unknown_paths_and_methods_are_answered_in_the_envelope(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "not_found"),
    ):
        reply = client.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"


def test_pages_of_listed_origins_may_call_and_no_others(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    ours, theirs = "https://chat.example.com", "https://evil.example.com"
    options = {"cors_origins": [ours]}
    with start_gateway(
        sqlite_database, tmp_path / "data", [gateway_engine.address], **options
    ) as running:
        asks = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,x-stainless-lang",
        }
        client = running.client()
        for origin, allowed in ((ours, ours), (theirs, None)):
            preflight = client.options("/v1/feedback", headers={"origin": origin, **asks})
            reply = client.get("/v1/models", headers={"origin": origin})
            refused = httpx.get(
                f"{running.url}/v1/models", headers={"origin": origin}, trust_env=False
            )
            assert preflight.status_code == (200 if allowed else 400)
            for found in (preflight, reply, refused):
                assert found.headers.get("access-control-allow-origin") == allowed
            assert (reply.status_code, refused.status_code) == (200, 401)
        exposed = client.get("/v1/models", headers={"origin": ours}).headers[
            "access-control-expose-headers"
        ]
        for name in ("x-request-id", "x-burnish-release", "x-ratelimit-reset-tokens"):
            assert name in exposed


def test_without_origins_nothing_is_said_to_other_pages(sqlite_gateway: RunningGateway) -> None:
    headers = {"origin": "https://chat.example.com"}
    reply = sqlite_gateway.client().get("/v1/models", headers=headers)
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["*", "chat.example.com", "https://a.com/", "https://*.a.com"])
def test_an_origin_that_is_none_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="cors_origins"):
        GatewaySettings(cors_origins=[origin])


def test_forwarded_headers_are_believed_from_listed_proxies_alone(
    sqlite_gateway: RunningGateway, tmp_path: Path
) -> None:
    app = create_app(sqlite_gateway.gateway)
    for proxies in ([], ["10.0.0.1"]):
        gateway = GatewaySettings(forwarded_allow_ips=proxies)
        config = build_config(app, Settings(data=tmp_path, gateway=gateway))
        config.load()
        wraps = type(config.loaded_app).__name__ == "ProxyHeadersMiddleware"
        assert wraps is bool(proxies)
        assert config.forwarded_allow_ips == proxies
