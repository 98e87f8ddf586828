"""Promise 33: told to end, a gateway is no longer ready, ends its streams, and leaves nothing."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus
from tests.promise_fixtures import Figures
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import scaled

pytestmark = pytest.mark.promises

STREAMS = 8


def test_streams_end_whole_after_sigterm_and_nobody_new_is_let_in(
    tmp_path: Path, figures: Figures
) -> None:
    turns = scaled(40)
    place = prepare(tmp_path)
    base, settings, database, key = place.base, place.settings, place.database, place.key()
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
    figures(sigterms=turns, streams_ended_whole=STREAMS * turns)


def test_what_takes_longer_than_the_drain_is_ended_with_a_word(tmp_path: Path) -> None:
    place = prepare(tmp_path)
    base, settings, key = place.base, place.settings, place.key()
    begun = threading.Barrier(3)
    with engine_process() as engine, ThreadPoolExecutor(2) as pool:
        httpx.post(
            f"{engine}/fake/faults", json={"token_seconds": 0.05, "endless": True}, trust_env=False
        )
        with gateway_process(
            settings.data,
            base.path,
            engine,
            tmp_path / "gateway.log",
            BURNISH_GATEWAY__DRAIN_TIMEOUT_SECONDS="1",
        ) as gateway:
            stream = pool.submit(_last_line, gateway.url, key, begun)
            plain = pool.submit(_plain_reply, gateway.url, key, begun)
            begun.wait(30)
            while httpx.get(f"{engine}/fake/state", trust_env=False).json()["running"] < 2:
                pass  # another process has no event to wait for
            assert gateway.terminate() == 0
            event, reply = stream.result(30), plain.result(30)
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
    database = Database(settings.database_url)
    with database.read() as session:
        ends = session.execute(select(Answer.status, Answer.error_code)).all()
    database.dispose()
    assert ends == [(AnswerStatus.INTERRUPTED, "shutting_down")] * 2


def _plain_reply(url: str, key: str, begun: threading.Barrier) -> httpx.Response:
    body = {"model": "assistant", "messages": [{"role": "user", "content": "Tell me a story."}]}
    headers = {"authorization": f"Bearer {key}"}
    begun.wait(30)
    return httpx.post(
        f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30, trust_env=False
    )


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
