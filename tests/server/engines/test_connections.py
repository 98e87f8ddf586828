"""Kept connections, against a server that says exactly what it is told to."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engines import connections
from server.engines.base import EngineUnreachable
from server.engines.connections import MOST_BUFFERED_BYTES, Connections

pytestmark = pytest.mark.anyio

HELLO = b"HTTP/1.1 200 OK\r\nX-Said: hello\r\nContent-Length: 5\r\n\r\nhello"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """A server on loopback; `serve` is what it does with each request."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.requests: list[bytes] = []
        self.connections = 0
        self.ended = asyncio.Event()  #: a client has closed its end

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self._serve(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            self.ended.set()
        finally:
            writer.close()


@asynccontextmanager
async def peer(
    serve: Serve, path: str = "", *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Peer, Connections]]:
    server_side = Peer(serve)
    server = await asyncio.start_server(server_side.meet, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    url = f"{'http' if tls is None else 'https'}://{host}:{port}{path}"
    pool = Connections("engine-1", url, {"Authorization": "Bearer k"})
    try:
        yield server_side, pool
    finally:
        pool.close()
        server.close()
        await server.wait_closed()


def says(*pieces: bytes) -> Serve:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)  # so that each piece travels alone

    return serve


async def post(pool: Connections, body: bytes = b"{}", seconds: float = 5.0) -> tuple[Any, bytes]:
    async with pool.post("/v1/x", body, headers={"X-Id": "7"}, timeout_seconds=seconds) as reply:
        return reply, b"".join([piece async for piece in reply.body])


async def test_a_connection_is_used_again_and_asks_as_it_was_told() -> None:
    async with peer(says(HELLO), "/engine/") as (server_side, pool):
        for _ in range(3):
            reply, body = await post(pool, b'{"a": 1}')
            assert (reply.status, reply.headers["x-said"], body) == (200, "hello", b"hello")
        assert server_side.connections == 1
        head, _, sent = server_side.requests[0].partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "POST /engine/v1/x HTTP/1.1"
        assert {"Authorization: Bearer k", "X-Id: 7", "Content-Length: 8"} < set(lines)
        assert sent == b'{"a": 1}'


async def test_requests_at_once_have_a_connection_each() -> None:
    async with peer(says(HELLO[:-5], b"hello")) as (server_side, pool):
        replies = await asyncio.gather(*(post(pool) for _ in range(5)))
        assert [body for _, body in replies] == [b"hello"] * 5
        assert server_side.connections == 5
        await post(pool)
        assert server_side.connections == 5


@pytest.mark.parametrize(
    "pieces",
    [
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"4\r\ndata",
            b"\r\n2\r\n: \r\n",
            b"0\r\n\r\n",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 6\r\n\r\nda", b"ta", b": "),
    ],
    ids=["chunked", "cut anywhere"],
)
async def test_bodies_come_whole_however_they_travel(pieces: tuple[bytes, ...]) -> None:
    async with peer(says(*pieces)) as (server_side, pool):
        for _ in range(2):
            assert (await post(pool))[1] == b"data: "
        assert server_side.connections == 1


async def test_a_body_may_end_with_its_connection() -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        writer.close()

    async with peer(serve) as (server_side, pool):
        for count in (1, 2):
            assert (await post(pool))[1] == b"all of it"
            assert server_side.connections == count


async def test_pieces_come_before_the_end_and_leaving_early_closes_the_connection() -> None:
    first = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhere\r\n"
    async with peer(says(first)) as (server_side, pool):
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
        async with asyncio.timeout(5):
            async with asked as reply:
                assert await anext(reply.body) == b"here"
            await server_side.ended.wait()
        assert server_side.connections == 1


async def test_what_was_not_read_of_a_reply_is_no_part_of_the_next_one() -> None:
    async with peer(says(HELLO)) as (server_side, pool):
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
        async with asked as reply:
            assert reply.status == 200
            await asyncio.sleep(0.05)  # all of it has come
        assert (await post(pool))[1] == b"hello"
        assert server_side.connections == 2


async def test_a_reply_that_filled_its_buffer_leaves_no_connection_that_is_not_read() -> None:
    large = b"x" * (4 * MOST_BUFFERED_BYTES)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(large)
    async with peer(says(head + large)) as (_, pool), asyncio.timeout(10):
        for _ in range(3):
            asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
            async with asked:
                await asyncio.sleep(0.05)  # nothing of it is taken
            assert (await post(pool))[1] == large


async def test_a_wait_that_is_cancelled_closes_the_connection() -> None:
    async with peer(says(b"HTTP/1.1 200")) as (server_side, pool):
        waiting = asyncio.ensure_future(post(pool))
        async with asyncio.timeout(5):
            while not server_side.requests:
                await asyncio.sleep(0.001)  # the request is on its way
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await server_side.ended.wait()


async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def reset(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def after_the_first(then: Serve) -> Serve:
    """Answers the first request of each connection; does `then` with every later one."""
    met: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer in met:
            await then(reader, writer)
        else:
            met.add(writer)
            writer.write(HELLO)

    return serve


@pytest.mark.parametrize("end", [hang_up, reset])
async def test_a_kept_connection_that_had_ended_is_replaced_by_a_new_one(end: Serve) -> None:
    async with peer(after_the_first(end)) as (server_side, pool):
        for count in (1, 2, 3):
            assert (await post(pool, b'{"a": 1}'))[1] == b"hello"
            assert server_side.connections == count
        assert {request.rpartition(b"\r\n")[2] for request in server_side.requests} == {b'{"a": 1}'}


@pytest.mark.parametrize("end", [hang_up, reset])
async def test_a_new_connection_that_ends_is_not_replaced(end: Serve) -> None:
    async with peer(end) as (server_side, pool):
        with pytest.raises(EngineUnreachable, match="the connection ended"):
            await post(pool)
        assert server_side.connections == len(server_side.requests) == 1


@pytest.mark.parametrize(
    ("then", "why"),
    [(says(b"HTTP/1.1 2"), "silent for 0.2 s"), (says(), "silent for 0.2 s")],
    ids=["a reply that began", "silence"],
)
async def test_a_kept_connection_that_fails_otherwise_is_not_replaced(
    then: Serve, why: str
) -> None:
    async with peer(after_the_first(then)) as (server_side, pool):
        await post(pool)
        with pytest.raises(EngineUnreachable, match=why):
            await post(pool, seconds=0.2)
        assert server_side.connections == 1


async def test_a_reply_that_broke_off_on_a_kept_connection_is_not_asked_for_again() -> None:
    async def begin_and_end(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1")
        writer.close()

    async with peer(after_the_first(begin_and_end)) as (server_side, pool):
        await post(pool)
        with pytest.raises(EngineUnreachable, match="the connection ended"):
            await post(pool)
        assert len(server_side.requests) == 2


async def test_a_reply_whose_end_was_not_read_leaves_no_kept_connection() -> None:
    async with peer(says(HELLO)) as (server_side, pool):
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
        async with asked as reply:
            assert await anext(reply.body) == b"hello"
        assert (await post(pool))[1] == b"hello"
        assert server_side.connections == 2


@pytest.mark.parametrize(
    ("serve", "why"),
    [
        (hang_up, "the connection ended"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"), "silent for 0.2 s"),
        (says(b"HTTP/1.1 200"), "silent for 0.2 s"),
        (says(b"SSH-2.0-OpenSSH\r\n\r\n"), "not HTTP"),
    ],
    ids=["hangs up", "is silent in its body", "is silent in its head", "speaks something else"],
)
async def test_a_broken_reply_is_an_engine_that_cannot_be_reached(serve: Serve, why: str) -> None:
    async with peer(serve) as (_, pool):
        with pytest.raises(EngineUnreachable, match=f"engine 'engine-1': .*{why}"):
            await post(pool, seconds=0.2)


async def test_a_body_that_is_cut_off_is_no_whole_one() -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        writer.close()

    async with peer(serve) as (_, pool):
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
        async with asked as reply:
            assert await anext(reply.body) == b"half"
            with pytest.raises(EngineUnreachable, match="the connection ended"):
                await anext(reply.body)


async def test_nobody_there_is_unreachable() -> None:
    server = await asyncio.start_server(Peer(says(HELLO)).meet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    with pytest.raises(EngineUnreachable, match="engine 'engine-1'"):
        await post(Connections("engine-1", f"http://127.0.0.1:{port}", {}))


async def test_a_connection_that_was_closed_or_idle_for_long_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO.replace(b"\r\nX-Said", b"\r\nConnection: close\r\nX-Said"))

    async with peer(serve) as (server_side, pool):
        await post(pool)
        await post(pool)
        assert server_side.connections == 2
    async with peer(says(HELLO)) as (server_side, pool):
        await post(pool)
        monkeypatch.setattr(connections, "KEEP_ALIVE_SECONDS", 0.0)
        await post(pool)
        assert server_side.connections == 2


async def check_that_what_is_not_read_is_not_taken(tls: ssl.SSLContext | None) -> None:
    sent = 0

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n")
        for _ in range(500):
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    async with peer(serve, tls=tls) as (server_side, pool), asyncio.timeout(30):
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=0.3)
        async with asked as reply:
            await asyncio.sleep(0.6)  # longer than the engine may be silent: it is not, we are
            piece = await anext(reply.body)
            assert len(piece) < MOST_BUFFERED_BYTES + 512 * 1024
            assert sent < 20_000_000  # what the kernel's buffers hold
            rest = [len(piece) async for piece in reply.body]
            assert len(piece) + sum(rest) == 50_000_000
        assert server_side.connections == 1


async def test_what_is_not_read_is_not_taken_from_the_engine() -> None:
    await check_that_what_is_not_read_is_not_taken(None)


# Over TLS: asyncio's and uvloop's are two implementations, and the gateway runs on the second.

ON_BOTH_LOOPS = pytest.mark.parametrize(
    "anyio_backend", ["asyncio", ("asyncio", {"use_uvloop": True})], ids=["asyncio", "uvloop"]
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key in the same file."""
    command = shutil.which("openssl")
    if command is None:
        pytest.skip("the command `openssl`, which makes the certificate, is not there")
    folder = tmp_path_factory.mktemp("tls")
    key, made = folder / "key.pem", folder / "certificate.pem"
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    options += ["-subj", "/CN=engine", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [command, "req", "-x509", *options, "-keyout", key, "-out", made],
        check=True,
        capture_output=True,
    )
    with made.open("a") as file:
        file.write(key.read_text())
    return made


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    """The server's side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


@ON_BOTH_LOOPS
@pytest.mark.usefixtures("trusted")
async def test_a_connection_over_tls_is_used_again(tls: ssl.SSLContext) -> None:
    async with peer(says(HELLO), "/engine", tls=tls) as (server_side, pool):
        for _ in range(3):
            reply, body = await post(pool, b'{"a": 1}')
            assert (reply.status, reply.headers["x-said"], body) == (200, "hello", b"hello")
        assert server_side.connections == 1
        head, _, sent = server_side.requests[-1].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /engine/v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
        assert sent == b'{"a": 1}'


@ON_BOTH_LOOPS
@pytest.mark.usefixtures("trusted")
async def test_a_stream_over_tls_comes_in_pieces_and_may_be_left(tls: ssl.SSLContext) -> None:
    go_on = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await go_on.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")

    async with peer(serve, tls=tls) as (server_side, pool), asyncio.timeout(10):
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
        async with asked as reply:
            assert await anext(reply.body) == b"first"
            go_on.set()
            assert [piece async for piece in reply.body] == [b"second"]
        go_on.clear()
        asked = pool.post("/v1/x", b"{}", headers={}, timeout_seconds=5)
        async with asked as reply:
            assert await anext(reply.body) == b"first"
        assert not server_side.ended.is_set()
        go_on.set()
        await server_side.ended.wait()
        assert server_side.connections == 1


@ON_BOTH_LOOPS
@pytest.mark.usefixtures("trusted")
async def test_what_is_not_read_over_tls_is_not_taken_from_the_engine(tls: ssl.SSLContext) -> None:
    await check_that_what_is_not_read_is_not_taken(tls)


@ON_BOTH_LOOPS
@pytest.mark.usefixtures("trusted")
async def test_a_connection_over_tls_that_ends_too_soon_is_unreachable(
    tls: ssl.SSLContext,
) -> None:
    for said in (b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"):

        async def serve(
            _reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes = said
        ) -> None:
            writer.write(said)
            writer.close()

        async with peer(serve, tls=tls) as (_, pool):
            with pytest.raises(EngineUnreachable, match="the connection ended"):
                await post(pool)


@ON_BOTH_LOOPS
async def test_a_certificate_that_is_not_trusted_is_said_to_be(tls: ssl.SSLContext) -> None:
    async with peer(says(HELLO), tls=tls) as (server_side, pool):
        # OpenSSL 1.1 writes it without the hyphen.
        with pytest.raises(EngineUnreachable, match=r"verify failed: self.signed certificate"):
            await post(pool)
        assert server_side.requests == []


@ON_BOTH_LOOPS
@pytest.mark.usefixtures("trusted")
async def test_a_certificate_for_another_host_is_said_to_be(tls: ssl.SSLContext) -> None:
    async with peer(says(HELLO), tls=tls, host="localhost") as (server_side, pool):
        with pytest.raises(EngineUnreachable, match="not valid for 'localhost'"):
            await post(pool)
        assert server_side.requests == []


async def answer_in_plain_text(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    writer.close()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


@ON_BOTH_LOOPS
@pytest.mark.parametrize(
    ("meet", "why"),
    [(answer_in_plain_text, "SSL"), (say_nothing, "no connection within 0.2 s")],
    ids=["answers in plain text", "says nothing"],
)
async def test_a_peer_that_does_not_speak_tls_is_unreachable(
    meet: Serve, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.2)
    ended = asyncio.Event()

    async def meet_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await meet(reader, writer)
        ended.set()

    server = await asyncio.start_server(meet_one, "127.0.0.1", 0)
    try:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(EngineUnreachable, match=f"engine 'engine-1': .*{why}"):
            await post(Connections("engine-1", url, {}))
        async with asyncio.timeout(5):
            await ended.wait()  # nothing of it is left open
    finally:
        server.close()
        await server.wait_closed()
