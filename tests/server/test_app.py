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
from server.access.keys import create_key
from server.app import build_config, create_app
from server.settings import GatewaySettings, ModelSettings, Settings
from server.setup.upgrade import upgrade
from tests.fake_engine import FakeEngine
from tests.gateway_fixtures import RunningGateway, start_gateway
from tests.promises.processes import build_model, engine_process, gateway_process


@pytest.mark.processes
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


def test_a_slash_too_many_means_nothing(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client()
    headers = {"host": "chat.example.org", "x-forwarded-proto": "https"}
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions//"):
        assert client.post(f"{sqlite_gateway.url}{path}", json=body, headers=headers).is_success
    for path in ("/v1/models/", "/admin/keys/", "//", "/static//page.js", "/healthz/"):
        reply = client.get(f"{sqlite_gateway.url}{path}", headers=headers)
        assert (reply.status_code, reply.history) == (200, []), path
    assert client.get("/v1/nothing/").status_code == 404


def test_head_is_answered_wherever_get_is_and_without_a_body(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    for path in ("/", "/healthz", "/readyz", "/openapi.json", "/v1/models", "/metrics"):
        told, read = client.head(path), client.get(path)
        assert (told.status_code, told.content) == (200, b""), path
        assert told.headers["content-type"] == read.headers["content-type"]
    assert client.head("/v1/chat/completions/none").status_code == 404
    assert client.head("/v1/comparisons").status_code == 405
    sqlite_gateway.gateway.stopping = True
    assert client.head("/readyz").status_code == 503


def test_options_needs_no_key_and_says_what_a_path_takes(sqlite_gateway: RunningGateway) -> None:
    for path, allowed in (
        ("/v1/chat/completions", "GET, HEAD, OPTIONS, POST"),
        ("/v1/feedback/tokens", "OPTIONS, POST"),
        ("/healthz", "GET, HEAD, OPTIONS"),
    ):
        reply = httpx.options(f"{sqlite_gateway.url}{path}", trust_env=False)
        assert (reply.status_code, reply.content) == (204, b"")
        assert reply.headers["allow"] == allowed
    assert httpx.options(f"{sqlite_gateway.url}/none", trust_env=False).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "advice"),
    [
        ("POST", "/v1/responses", "use POST /v1/chat/completions"),
        ("POST", "/v1/responses/resp_1/cancel", "use POST /v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1 twice: set base_url to http://h:1/v1"),
        ("GET", "/v1/v1/models", "/v1 twice"),
        ("POST", "/chat/completions", "lacks /v1: set base_url to http://h:1/v1"),
        ("GET", "/models", "lacks /v1"),
        ("GET", "/fine_tuning/jobs/ftjob-1", "lacks /v1"),
        ("POST", "/v1/chat/completions/chat/completions", "base_url ends with a route"),
        ("GET", "/chat/completions/v1/models", "base_url ends with a route"),
        ("POST", "/api/v1/chat/completions", "at the root of its host"),
        ("POST", "/v1/embeddings", "no /v1/embeddings"),
        ("POST", "/v1/audio/transcriptions", "no /v1/audio"),
        ("POST", "/v1/batches", "no /v1/batches"),
        ("POST", "/v1/threads/thread_1/runs", "no Assistants API"),
        ("POST", "/v1/messages", "Anthropic's API"),
        ("GET", "/api/tags", "Ollama's API"),
        ("POST", "/openai/deployments/gpt/chat/completions", "no part of the path"),
    ],
)
def test_a_path_of_another_api_says_what_to_use_or_to_set(
    sqlite_gateway: RunningGateway, method: str, path: str, advice: str
) -> None:
    reply = sqlite_gateway.client().request(method, path, headers={"host": "h:1"})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (404, "not_found")
    assert error["message"].startswith(f"no such path: {method} {path}; ")
    assert advice in error["message"]


def test_a_request_without_a_usable_key_is_401_in_the_envelope(
    sqlite_gateway: RunningGateway,
) -> None:
    key = sqlite_gateway.admin_key
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    for authorization, status in (
        ("", 401),
        ("Bearer", 401),
        ("Basic eDp5", 401),
        (key, 401),
        (f"bearer {key}", 200),
        (f"BEARER   {key}", 200),
    ):
        headers = {"authorization": authorization}
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
            reply = httpx.request(
                method, sqlite_gateway.url + path, json=body, headers=headers, trust_env=False
            )
            assert reply.status_code == status, (authorization, path)
            if status == 401:
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"


def test_errors_repeat_nothing_that_steers_a_terminal(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client()
    steering = "\x1b]0;mine\x07\x9b2J\u202e\u2066\r"
    question = [{"role": "user", "content": "hi"}]
    replies = [
        client.get("/v1/nothing/%1b]0;mine%07%c2%9b2J%e2%80%ae%e2%81%a6%0d"),
        client.post("/v1/chat/completions", json={"model": steering, "messages": question}),
        client.post("/v1/chat/completions", json={"model": "assistant", "messages": steering}),
        client.post("/v1/feedback", json={"kind": "rating", "value": True, steering: 1}),
        client.get("/v1/models/%1b[2J"),
    ]
    for reply in replies:
        assert 400 <= reply.status_code < 500
        error = reply.json()["error"]
        for text in (error["message"], error["param"] or ""):
            assert all(c.isprintable() for c in text), error
