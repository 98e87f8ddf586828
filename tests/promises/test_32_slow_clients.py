"""Promise 32: whoever never reads costs bounded memory, and the others no time."""

from __future__ import annotations

import json
import socket
import statistics
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import func, select

from feedback.tables import Answer, AnswerStatus
from tests.promise_fixtures import Figures
from tests.promises.load import ask_at_rate, resident_mib
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import is_full, scaled

pytestmark = pytest.mark.promises

NEVER_READING, ROUNDS = 4, 3
TOKENS = 100_000  #: about 25 MB of events in one answer
MOST_MIB = 8.0  #: that such a client may cost the gateway, buffers of both its connections included

PATIENT = {"BURNISH_GATEWAY__WRITE_TIMEOUT_SECONDS": "600"}  #: they stay to be measured


def test_clients_that_never_read_neither_fill_the_memory_nor_slow_the_others(
    tmp_path: Path,
    figures: Figures,
) -> None:
    asked = scaled(1_000)
    place = prepare(tmp_path)
    base, settings, database = place.base, place.settings, place.database
    key = place.key()
    log = tmp_path / "gateway.log"
    with (
        ExitStack() as stack,
        engine_process() as engine,
        gateway_process(settings.data, base.path, engine, log, **PATIENT) as gateway,
    ):
        pid = int((settings.data / "burnish.gateway.lock").read_text())
        ask_at_rate(gateway.url, "assistant", key, requests=asked)  # the first ones are slower
        alone = [ask_at_rate(gateway.url, "assistant", key, requests=asked) for _ in range(ROUNDS)]
        before = resident_mib(pid)
        for _ in range(NEVER_READING):
            stack.enter_context(_ask_and_never_read(gateway.url, key))
        beside = [ask_at_rate(gateway.url, "assistant", key, requests=asked) for _ in range(ROUNDS)]
        assert [(run["ends"], run["failures"]) for run in beside] == [(asked, 0)] * ROUNDS
        grown = resident_mib(pid) - before
        assert grown < MOST_MIB * NEVER_READING
        with database.read() as session:
            running = select(func.count()).where(Answer.status == AnswerStatus.STARTED)
            assert session.scalar(running) == NEVER_READING  # the engine waits for them
        stack.close()  # they go
        assert gateway.terminate() == 0
    with database.read() as session:
        rows = dict(
            session.execute(select(Answer.status, func.count()).group_by(Answer.status)).all()
        )
    database.dispose()
    assert rows == {
        AnswerStatus.COMPLETE: (1 + 2 * ROUNDS) * asked,
        AnswerStatus.INTERRUPTED: NEVER_READING,
    }
    p95, p95_alone = (statistics.median(run["p95_ms"] for run in runs) for runs in (beside, alone))
    ratio = p95 / p95_alone
    figures(never_reading=NEVER_READING, grown_mib=round(grown, 1), p95_ratio=round(ratio, 2))
    if is_full():  # a busy machine says nothing about it
        assert ratio <= 1.2


def _ask_and_never_read(url: str, key: str) -> socket.socket:
    """A connection whose request was sent, and whose answer waits for its first byte to be read."""
    body = {
        "model": "assistant",
        "messages": [{"role": "user", "content": "Tell me everything."}],
        "stream": True,
        "max_tokens": TOKENS,
    }
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (key.encode(), len(raw), raw)
    )
    connection.recv(1, socket.MSG_PEEK)  # it has begun
    return connection
