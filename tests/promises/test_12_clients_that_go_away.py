"""Promise 12: a client that goes away stops its generation within a second, and leaves no trace."""

from __future__ import annotations

import json
import random
import socket
import time

import pytest
from sqlalchemy import func, select

from feedback.tables import Answer, AnswerStatus
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled

pytestmark = pytest.mark.promises


def test_after_many_who_went_no_request_counts_as_running(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine, figures: Figures
) -> None:
    clients, chance = scaled(1_000), random.Random(0)
    key = sqlite_gateway.key("anna").encode()
    port = int(sqlite_gateway.url.rpartition(":")[2])
    gateway_engine.faults = Faults(endless=True, token_seconds=0.002)
    slowest = 0.0
    for batch in range(0, clients, 10):
        connections = []
        for number in range(batch, min(batch + 10, clients)):
            message = {"role": "user", "content": f"question {number}"}
            body = {"model": "assistant", "messages": [message], "stream": bool(number % 2)}
            raw = json.dumps(body).encode()
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (key, len(raw), raw)
            )
            connections.append(connection)
        count = len(connections)
        gateway_engine.wait_until(lambda engine, count=count: engine.running == count)
        chance.shuffle(connections)
        began = time.monotonic()
        for connection in connections:
            connection.close()
        gateway_engine.wait_until(lambda engine: engine.running == 0, timeout_seconds=1.0)
        slowest = max(slowest, time.monotonic() - began)
    assert gateway_engine.aborted == clients
    deadline = time.monotonic() + 10
    while True:  # the rows follow; nobody waits for their commit
        with sqlite_gateway.database.read() as session:
            ended = session.scalar(
                select(func.count())
                .select_from(Answer)
                .where(Answer.status == AnswerStatus.INTERRUPTED)
            )
        if ended == clients:
            break
        assert time.monotonic() < deadline
        # The row is written by the gateway's own thread; the database has no event.
        time.sleep(0.02)
    assert all(not t.running for t in sqlite_gateway.gateway.chooser.replicas.values())
    figures(clients=clients, slowest_stop_seconds=round(slowest, 2), left_running=0)
