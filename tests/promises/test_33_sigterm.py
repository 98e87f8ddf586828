"""Promise 33: told to end, a gateway is no longer ready, ends its streams, and leaves nothing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus
from server.auth import create_key
from server.settings import ModelSettings, Settings
from server.upgrade import upgrade
from tests.promises.processes import build_model, engine_process, gateway_process
from tests.promises.scale import scaled

pytestmark = pytest.mark.promises

STREAMS = 8


def test_streams_end_whole_after_sigterm_and_nobody_new_is_let_in(tmp_path: Path) -> None:
    turns = scaled(40)
    base = build_model(tmp_path / "tiny")
    settings = Settings(data=tmp_path / "data", model=ModelSettings(path=str(base.path)))
    settings.data.mkdir()
    database = Database(settings.database_url)
    upgrade(settings, database, base, url="http://127.0.0.1")
    with database.write() as session:
        _, key = create_key(session, user="anna", scopes=["chat"])
    log = tmp_path / "gateway.log"
    with engine_process() as engine, ThreadPoolExecutor(STREAMS + 1) as pool:
        httpx.post(f"{engine}/fake/faults", json={"token_seconds": 0.05}, trust_env=False)
        for _ in range(turns):
            with gateway_process(settings.data, base.path, engine, log) as gateway:
                begun = threading.Barrier(STREAMS + 1)
                streams = [pool.submit(_last_line, gateway.url, key, begun) for _ in range(STREAMS)]
                begun.wait(30)
                ending = pool.submit(gateway.terminate)
                while _is_ready(gateway.url):  # another process has no event to wait for
                    assert not any(stream.done() for stream in streams)
                assert not all(stream.done() for stream in streams)  # readiness went first
                assert [stream.result(30) for stream in streams] == ["data: [DONE]"] * STREAMS
                assert ending.result(30) == 0
    with database.read() as session:
        rows = dict(
            session.execute(select(Answer.status, func.count()).group_by(Answer.status)).all()
        )
    database.dispose()
    assert rows == {AnswerStatus.COMPLETE: STREAMS * turns}
    print(f"33: {turns} SIGTERMs, {STREAMS * turns} streams ended whole")


def _last_line(url: str, key: str, begun: threading.Barrier) -> str:
    body = {
        "model": "assistant",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
        "max_tokens": 40,
    }
    headers = {"authorization": f"Bearer {key}"}
    chat = f"{url}/v1/chat/completions"
    last = ""
    with (
        httpx.Client(headers=headers, timeout=30, trust_env=False) as client,
        client.stream("POST", chat, json=body) as reply,
    ):
        assert reply.status_code == 200
        for number, line in enumerate(line for line in reply.iter_lines() if line):
            if number == 1:
                begun.wait(30)
            last = line
    return last


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False  # nothing listens any more
