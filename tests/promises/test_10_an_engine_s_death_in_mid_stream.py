"""Promise 10: an engine that is killed while it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus, AnswerText
from server.engines.base import EngineAddress
from server.processes.engine import free_port
from tests.gateway_fixtures import RunningGateway, start_gateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled

pytestmark = pytest.mark.promises
CHAT = "/v1/chat/completions"


class Engine:
    """A fake engine in a process, on the same port each time it is started."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, **faults: Any) -> None:
        command = [sys.executable, "-P", "-m", "tests.fake_engine", "--port", str(self.port)]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.post(f"{self.url}/fake/faults", json=faults, trust_env=False)
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline
                # The engine's process starts: there is nothing to wait on but its port.
                time.sleep(0.02)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def stream(client: httpx.Client, first: threading.Event, lines: list[str]) -> None:
    body = {"model": "assistant", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    with client.stream("POST", CHAT, json=body) as reply:
        for line in reply.iter_lines():
            lines.append(line)
            first.set()


def test_a_killed_engine_ends_its_streams_within_two_seconds_and_returns_only_proven(
    sqlite_database: Database, tmp_path: Path, figures: Figures
) -> None:
    engine = Engine()
    engine.start(token_seconds=0.02)
    try:
        address = EngineAddress("engine-0", engine.url)
        with start_gateway(sqlite_database, tmp_path / "data", [address]) as gateway:
            candidate = gateway.candidate(1)
            gateway.promote(candidate.name)
            slowest = 0.0
            for _ in range(scaled(40)):
                slowest = max(slowest, kill_in_mid_stream(gateway, engine))
                engine.start(token_seconds=0.02)
                gateway.reconcile()
                answer = gateway.client().post(
                    CHAT,
                    json={"model": "assistant", "messages": [{"role": "user", "content": "hi"}]},
                )
                said = answer.json()["choices"][0]["message"]["content"]
                assert said.startswith(candidate.signature)
                state = httpx.get(f"{engine.url}/fake/state", trust_env=False).json()
                asked = [request["path"] for request in state["requests"]]
                # How it reads a chat was looked at first.
                assert [path for path in asked if path != "/tokenize"] == [
                    "/v1/load_lora_adapter",
                    "/v1/completions",  # the probe of the base
                    "/v1/completions",  # and of the adapter
                    CHAT,
                ]
    finally:
        engine.kill()
    figures(kills=scaled(40), slowest_end_seconds=round(slowest, 2))


def kill_in_mid_stream(gateway: RunningGateway, engine: Engine) -> float:
    """Seconds from the kill to the stream's end; the row has what was said until then."""
    first, lines = threading.Event(), []
    reader = threading.Thread(target=stream, args=(gateway.client(), first, lines))
    reader.start()
    assert first.wait(10)
    engine.kill()
    began = time.monotonic()
    reader.join(10)
    seconds = time.monotonic() - began
    assert not reader.is_alive()
    assert seconds <= 2
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert events[-1]["error"]["code"] == "engine_failed"
    heard = "".join(event["choices"][0]["delta"]["content"] for event in events[:-1])
    with gateway.database.read() as session:
        row = session.scalars(select(Answer).order_by(Answer.id.desc()).limit(1)).one()
        text = session.get_one(AnswerText, row.id)
    assert row.status == AnswerStatus.INTERRUPTED
    assert text.choices is not None
    assert text.choices[0]["message"]["content"] == heard
    return seconds
