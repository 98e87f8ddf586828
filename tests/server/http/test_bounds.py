"""What one connection may take: heads, time, a place; and offers that nobody takes."""

from __future__ import annotations

import asyncio
import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from sqlalchemy import select as select_rows
from uvicorn.server import ServerState

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus
from server.http.bounds import MOST_HEAD_BYTES, BoundedHttpProtocol, Bounds, _HeadFirst
from server.metrics import Figures
from server.settings import GatewaySettings
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import RunningGateway, start_gateway


def exchange(gateway: RunningGateway, *pieces: bytes) -> tuple[int, dict[str, str | None]]:
    """Status and error of the last reply to raw bytes."""
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while more := connection.recv(65536):
            received += more
    head, _, body = received.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    return int(head.split()[0]), json.loads(body)["error"]


START = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (START, b"x-long: " + b"a" * 64 * 1024 + b"\r\n\r\n"),
        (START, b"x-endless: ", b"a" * 40_000, b"a" * 40_000),
        (START, *[b"x-many: 1234567890\r\n" * 100] * 20),
        (b"GET /" + b"a" * 64 * 1024, b" HTTP/1.1\r\n\r\n"),
        (
            b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
            b"1\r\na\r\n0\r\n" + b"x-trailer: a\r\n" * 2000 + b"\r\n",
        ),
    ],
    ids=["one header", "without an end", "many", "path", "trailers"],
)
def test_a_head_beyond_the_bound_is_refused_in_the_envelope(
    sqlite_gateway: RunningGateway, pieces: tuple[bytes, ...]
) -> None:
    status, error = exchange(sqlite_gateway, *pieces)
    assert (status, error["code"]) == (431, "headers_too_large")
    assert str(MOST_HEAD_BYTES) in (error["message"] or "")


def test_what_is_no_http_is_refused_in_the_envelope(sqlite_gateway: RunningGateway) -> None:
    status, error = exchange(sqlite_gateway, b"NONSENSE\r\n\r\n")
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_requests_within_the_bound_share_a_connection_with_large_bodies(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    body |= {"x_padding": "a" * 200_000}
    for _ in range(3):
        headers = {"x-long": "a" * 15_000}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert client.get("/healthz", headers=headers).status_code == 200


def test_other_clients_are_answered_while_one_never_ends_its_head(
    sqlite_gateway: RunningGateway,
) -> None:
    address = urlsplit(sqlite_gateway.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(START)
        assert httpx.get(f"{sqlite_gateway.url}/healthz", trust_env=False).status_code == 200


# Offers of another protocol

H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQA\r\n"
WEBSOCKET = (
    b"connection: keep-alive, upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
)
QUESTION = json.dumps(
    {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
).encode()


def post(
    key: str, *, more: bytes = b"", body: bytes = QUESTION, length: int | None = None
) -> bytes:
    """A chat as bytes; `length` differs from the body's where the rest is held back."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        + key.encode()
        + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        % (len(body) if length is None else length)
        + more
        + b"\r\n"
        + body
    )


@contextmanager
def connected(gateway: RunningGateway) -> Iterator[socket.socket]:
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Everything until the gateway ends the connection."""
    received = b""
    try:
        while more := connection.recv(65536):
            received += more
    except ConnectionResetError:
        pass
    return received


def statuses(received: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked(
    sqlite_gateway: RunningGateway,
) -> None:
    body = json.dumps({"id": "key_0", "user": "anna", "scopes": ["chat"]}).encode()
    head = post(
        sqlite_gateway.admin_key, more=b"expect: 100-continue\r\n", body=b"", length=len(body)
    )
    for path, expected in ((b"/v1/chat/completions", 400), (b"/admin/keys", 400)):
        with connected(sqlite_gateway) as connection:
            connection.sendall(head.replace(b"/v1/chat/completions", path))
            assert statuses(connection.recv(65536)) == [100]
            connection.sendall(body)
            assert statuses(connection.recv(65536)) == [expected], path


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
def test_an_offer_of_another_protocol_is_passed_over(
    sqlite_gateway: RunningGateway, offer: bytes
) -> None:
    asked = post(sqlite_gateway.admin_key, more=offer)
    last = post(sqlite_gateway.admin_key, more=b"connection: close\r\n")
    head = asked.index(b"\r\n\r\n") + 4
    for cut in (20, head - 10, head, head + 5, len(asked)):
        with connected(sqlite_gateway) as connection:
            connection.sendall(asked[:cut])
            # Two packets, also where the kernel would have made one of them.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(asked[cut:])
            connection.sendall(asked + last)
            assert statuses(read_all(connection)) == [200, 200, 200], cut


def test_an_offer_with_a_body_in_chunks_is_passed_over(sqlite_gateway: RunningGateway) -> None:
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(QUESTION), QUESTION)
    more = b"transfer-encoding: chunked\r\n" + H2C
    asked = post(sqlite_gateway.admin_key, more=more, body=b"", length=0)
    asked = asked.replace(b"content-length: 0\r\n", b"") + chunks
    with connected(sqlite_gateway) as connection:
        connection.sendall(asked + post(sqlite_gateway.admin_key, more=b"connection: close\r\n"))
        assert statuses(read_all(connection)) == [200, 200]


def test_a_client_that_takes_the_gateway_for_a_proxy_is_told(
    sqlite_gateway: RunningGateway,
) -> None:
    status, error = exchange(sqlite_gateway, b"CONNECT example.org:443 HTTP/1.1\r\nhost: x\r\n\r\n")
    assert status == 400
    assert "CONNECT" in (error["message"] or "")


# What comes amid an answer


def test_what_cannot_be_read_stands_in_no_answer(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    gateway_engine.faults = Faults(token_seconds=0.02)
    with connected(sqlite_gateway) as connection:
        connection.sendall(post(sqlite_gateway.admin_key))
        connection.sendall(b"NONSENSE\r\n\r\n")
        received = read_all(connection)
    assert statuses(received) == [200]
    assert b'"finish_reason"' in received


def test_a_flood_of_requests_on_one_connection_is_cut_off(sqlite_gateway: RunningGateway) -> None:
    with connected(sqlite_gateway) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost:x\r\n\r\n" * 5_000)
        found = statuses(read_all(connection))
    assert set(found) == {200}
    assert 1 <= len(found) < 5_000


# Time


HASTY = {f"{what}_timeout_seconds": 0.4 for what in ("head", "body", "write", "keep_alive")}


@pytest.fixture
def hasty_gateway(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> Iterator[RunningGateway]:
    """A gateway with little patience."""
    with start_gateway(
        sqlite_database, tmp_path / "data", [gateway_engine.address], **HASTY
    ) as running:
        yield running


def ended(gateway: RunningGateway) -> dict[str, int]:
    """How many connections the gateway has ended, by reason."""
    samples = gateway.count("burnish_connections_ended")
    return {labels["reason"]: count for labels, count in samples}


@pytest.mark.parametrize("begun", [START, b"GET"])
def test_a_head_that_never_ends_is_answered_408(
    hasty_gateway: RunningGateway, begun: bytes
) -> None:
    status, error = exchange(hasty_gateway, begun)
    assert (status, error["code"]) == (408, "request_timeout")
    assert "gateway.head_timeout_seconds" in (error["message"] or "")
    assert ended(hasty_gateway) == {"head_timeout": 1}


def test_connections_without_a_request_are_closed_without_a_word(
    hasty_gateway: RunningGateway,
) -> None:
    with connected(hasty_gateway) as fresh, connected(hasty_gateway) as kept:
        kept.sendall(START + b"\r\n")
        assert read_all(fresh) == b""
        assert statuses(read_all(kept)) == [200]


def test_a_body_that_never_ends_is_answered_408(hasty_gateway: RunningGateway) -> None:
    status, error = exchange(hasty_gateway, post(hasty_gateway.admin_key, length=5_000))
    assert (status, error["code"]) == (408, "request_timeout")
    upload = post(hasty_gateway.admin_key, body=b"", length=5_000)
    upload = upload.replace(b"/v1/chat/completions", b"/v1/files")
    upload = upload.replace(b"application/json", b"multipart/form-data; boundary=x")
    assert exchange(hasty_gateway, upload)[0] == 408
    assert ended(hasty_gateway) == {"body_timeout": 2}


def test_a_client_that_stays_after_its_refusal_is_refused_once(
    hasty_gateway: RunningGateway,
) -> None:
    with connected(hasty_gateway) as connection:
        connection.sendall(post(hasty_gateway.admin_key, length=5_000))
        assert statuses(read_all(connection)) == [408]
        threading.Event().wait(0.6)  # several looks at it: only time can show it
        assert ended(hasty_gateway) == {"body_timeout": 1}


def test_a_body_that_comes_steadily_has_time(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    patience = {"body_timeout_seconds": 0.1}
    asked = post("KEY", body=QUESTION[:-1] + b', "x_long": "' + b"a" * 20_000 + b'"}')
    with start_gateway(
        sqlite_database, tmp_path / "data", [gateway_engine.address], **patience
    ) as running:
        asked = asked.replace(b"KEY", running.admin_key.encode())
        with connected(running) as connection:
            connection.sendall(asked[:-10])
            # Longer than the timeout, and shorter than 20 KiB have: only time can show it.
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.sendall(asked[-10:])
            connection.settimeout(30)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_rest_of_a_body_that_was_answered_is_not_waited_for(
    hasty_gateway: RunningGateway,
) -> None:
    with connected(hasty_gateway) as connection:
        connection.sendall(post("sk-burnish-nobody", length=1_000_000))
        assert statuses(read_all(connection)) == [401]


def never_read(connection: socket.socket) -> None:
    """Wait until the gateway resets the connection, and read nothing."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    assert poll.poll(30_000)


def test_a_client_that_does_not_read_is_ended_and_its_answer_recorded(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    body = {**json.loads(QUESTION), "stream": True, "max_tokens": 100_000}
    with start_gateway(
        sqlite_database, tmp_path / "data", [gateway_engine.address], **HASTY
    ) as running:
        with connected(running) as connection:
            connection.sendall(post(running.admin_key, body=json.dumps(body).encode()))
            never_read(connection)
        assert ended(running) == {"write_timeout": 1}
    with sqlite_database.read() as session:
        assert session.scalars(select_rows(Answer.status)).all() == [AnswerStatus.INTERRUPTED]


def test_a_client_that_reads_no_other_reply_is_ended(hasty_gateway: RunningGateway) -> None:
    with connected(hasty_gateway) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(400):  # each is more than half of what the gateway would keep
            try:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost:x\r\n\r\n")
            except ConnectionError:
                break
        never_read(connection)
    assert ended(hasty_gateway) == {"write_timeout": 1}


# Places


def test_connections_that_send_nothing_keep_nobody_out(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    most = 8
    with (
        start_gateway(
            sqlite_database, tmp_path / "data", [gateway_engine.address], max_connections=most
        ) as running,
        ExitStack() as stack,
    ):
        opened = [stack.enter_context(connected(running)) for _ in range(3 * most)]
        for connection in opened[::2]:
            connection.sendall(START)
        client = running.client()
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/chat/completions", content=QUESTION).status_code == 200
        for displaced in opened[: 2 * most]:
            assert read_all(displaced) == b""
        assert ended(running) == {"displaced": 2 * most + 1}


def test_a_connection_beyond_the_busy_ones_is_told_to_try_again(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> None:
    gateway_engine.faults = Faults(token_seconds=0.05)
    body = json.dumps({**json.loads(QUESTION), "stream": True}).encode()
    with (
        start_gateway(
            sqlite_database, tmp_path / "data", [gateway_engine.address], max_connections=2
        ) as running,
        connected(running) as first,
        connected(running) as second,
    ):
        for busy in (first, second):
            busy.sendall(post(running.admin_key, body=body, more=b"connection: close\r\n"))
            assert busy.recv(12) == b"HTTP/1.1 200"
        status, error = exchange(running, START + b"\r\n")
        assert (status, error["code"]) == (503, "too_many_connections")
        for busy in (first, second):
            assert b"data: [DONE]" in read_all(busy)
        assert running.client().get("/healthz").status_code == 200


# One protocol on a transport whose client takes what the test says


class Unread(asyncio.Transport):
    """A connection of which the test says how much was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0  #: bytes that the client has not taken
        self.writes: list[bytes] = []
        self.closing = self.aborted = False

    def write(self, data: Any) -> None:
        assert not self.closing
        self.left += len(data)
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.left

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def says_hello_later(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for piece in (b"he", b"llo"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def says_hello(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


def build_bounds(**settings: Any) -> Bounds:
    return Bounds(GatewaySettings(**settings), Figures().connections_ended)


async def connect(bounds: Bounds, *sent: bytes, app: Any = says_hello) -> BoundedHttpProtocol:
    """A connection that has sent this, after the gateway did what it can do about it."""
    config = uvicorn.Config(app, log_config=None)
    protocol: BoundedHttpProtocol = bounds.protocol()(config, ServerState(), {})
    protocol.connection_made(Unread())
    for piece in sent:
        protocol.data_received(piece)
        for _ in range(5):
            await asyncio.sleep(0)
    return protocol


def transport_of(connection: BoundedHttpProtocol) -> Unread:
    transport = connection.transport
    assert isinstance(transport, Unread)
    return transport


HALF_A_BODY = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"
LAST = START + b"connection: close\r\n\r\n"


@pytest.mark.anyio
@pytest.mark.parametrize("sent", [HALF_A_BODY, LAST, START + b"\r\n"])
async def test_who_was_answered_without_a_key_keeps_nobody_out(sent: bytes) -> None:
    bounds = build_bounds(max_connections=1)
    held = await connect(bounds, sent)
    assert transport_of(held).left
    assert not transport_of(held).aborted
    assert not transport_of(await connect(bounds)).left
    assert transport_of(held).aborted


@pytest.mark.anyio
async def test_who_asks_on_and_reads_nothing_keeps_nobody_out() -> None:
    bounds = build_bounds(max_connections=2)
    longest, other = [await connect(bounds, START + b"\r\n") for _ in range(2)]
    for connection in (longest, other):
        connection.pause_writing()
        connection.data_received(START + b"\r\n")
        await asyncio.sleep(0)
    await connect(bounds)
    assert [transport_of(held).aborted for held in (longest, other)] == [True, False]
    for connection in (longest, other):
        connection.connection_lost(None)


@pytest.mark.anyio
async def test_a_reply_on_its_way_is_cut_off_only_where_each_place_has_one() -> None:
    bounds = build_bounds(max_connections=2)
    first, second = [await connect(bounds, START + b"\r\n") for _ in range(2)]
    transport_of(second).left = 0
    await connect(bounds, START + b"\r\n")
    assert [transport_of(held).aborted for held in (first, second)] == [False, True]
    await connect(bounds)
    assert transport_of(first).aborted


@pytest.mark.anyio
async def test_a_last_reply_that_is_taken_steadily_is_taken_whole() -> None:
    bounds = build_bounds(write_timeout_seconds=10)
    connection = await connect(bounds)
    transport = transport_of(connection)
    transport.left = 10_000_000  # of an earlier reply
    connection.data_received(LAST)
    while not transport.closing:
        await asyncio.sleep(0)
    now = time.monotonic()
    for _ in range(5):
        transport.left -= 20_000
        connection.look(now := now + 11)
        assert not transport.aborted
    with pytest.raises(AttributeError):  # it has no socket to tell
        connection.look(now + 11)
    assert transport.aborted


@pytest.mark.anyio
async def test_a_look_that_fails_ends_no_bound(caplog: pytest.LogCaptureFixture) -> None:
    bounds = build_bounds(head_timeout_seconds=0.01)
    broken, other = await connect(bounds), await connect(bounds)
    closed = asyncio.Event()
    # Ignored: one connection's method is replaced, by what fails and by what tells.
    broken.look = lambda now: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    other.look = lambda now: closed.set()  # type: ignore[method-assign]
    for _ in range(2):
        async with asyncio.timeout(30):
            await closed.wait()
        closed.clear()
    actions = {getattr(record, "action", None) for record in caplog.records}
    assert actions == {"connection_look_failed"}
    for connection in (broken, other):
        connection.connection_lost(None)


@pytest.mark.anyio
@pytest.mark.parametrize("head", [START + b"\r\n", LAST])
async def test_a_reply_that_is_there_leaves_in_one_write(head: bytes) -> None:
    connection = await connect(build_bounds(), head)
    (written,) = transport_of(connection).writes
    assert written.startswith(b"HTTP/1.1 200")
    assert written.endswith(b"\r\n\r\nhello")
    assert transport_of(connection).closing is (head == LAST)


@pytest.mark.anyio
async def test_a_head_does_not_wait_for_a_body_that_comes_later() -> None:
    connection = await connect(build_bounds(), START + b"\r\n", app=says_hello_later)
    head, *pieces = transport_of(connection).writes
    assert head.endswith(b"\r\n\r\n")
    assert b"hello" not in head
    assert pieces == [b"2\r\nhe\r\n", b"3\r\nllo\r\n", b"0\r\n\r\n"]


@pytest.mark.anyio
async def test_the_head_of_a_reply_without_a_body_leaves_before_the_next_reply() -> None:
    asked = START.replace(b"GET", b"HEAD") + b"\r\n"
    connection = await connect(build_bounds(), asked + START + b"\r\n")
    first, second = transport_of(connection).writes
    assert b"hello" not in first
    assert second.endswith(b"hello")


@pytest.mark.anyio
async def test_a_head_whose_client_has_gone_is_dropped_without_a_word() -> None:
    class Closed(Unread):
        def write(self, data: Any) -> None:
            raise RuntimeError("the handler is closed")

    held = _HeadFirst(Closed(), asyncio.get_running_loop())
    held.write(b"HTTP/1.1 200 OK\r\n\r\n")
    held.flush()
    assert held.is_closing() is False  # all else is the transport's own
