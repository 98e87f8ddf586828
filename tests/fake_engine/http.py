"""A bare HTTP/1.1 server for the fake engine.

Owns: connections. A handler answers a request at once, or returns a coroutine that answers it in
time and is cancelled when the client goes away. Unlike an ASGI server it can hang up before or
inside a reply, as a dying engine does. Does not own: what is answered. Not for clients that
pipeline; none of ours do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import Any, cast

import httptools

logger = logging.getLogger(__name__)

_END = b"0\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"vary: Origin\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Exchange:
    """One request, and the ways to answer it: `reply`, `send` … `end`, or `hang_up`."""

    __slots__ = ("_connection", "body", "headers", "method", "path")

    def __init__(
        self,
        connection: Connection,
        method: str,
        path: str,
        headers: dict[bytes, bytes],
        body: bytes,
    ) -> None:
        self._connection = connection
        self.method = method
        self.path = path
        self.headers = headers  #: names in lower case
        self.body = body

    def reply(
        self, status: int, body: bytes, content_type: str | None = "application/json"
    ) -> None:
        """Answer whole."""
        kind = f"content-type: {content_type}\r\n" if content_type else ""
        self._connection.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nserver: uvicorn\r\n{kind}"
            f"content-length: {len(body)}\r\nvary: Origin\r\n\r\n".encode()
            + body
        )
        self._connection.finish()

    def start_stream(self) -> None:
        """Answer 200 with server-sent events, which `send` delivers."""
        self._connection.transport.write(_STREAM_HEAD)

    def send(self, events: Iterable[bytes]) -> None:
        """Deliver events, each in an HTTP chunk of its own, in one write."""
        self._connection.transport.write(
            b"".join([b"%x\r\n%b\r\n" % (len(event), event) for event in events])
        )

    async def drain(self) -> None:
        """Wait until the client has read enough for more to be sent."""
        await self._connection.writable.wait()

    def end(self) -> None:
        """End the stream as promised."""
        self._connection.transport.write(_END)
        self._connection.finish()

    def hang_up(self) -> None:
        """Close the connection, whatever the client still waits for."""
        self._connection.transport.close()


Waiting = Coroutine[Any, Any, None]
Handler = Callable[[Exchange], Waiting | None]


class Connection(asyncio.Protocol):
    """One client; one request at a time."""

    transport: asyncio.Transport

    def __init__(self, handler: Handler, open_connections: set[Connection]) -> None:
        self.writable = asyncio.Event()
        self.writable.set()
        self._lost = asyncio.Event()
        self._handler = handler
        self._open = open_connections
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []

    async def abort(self) -> None:
        """Close without delivering what is still to be sent; returns when all of it is over."""
        self.transport.abort()
        await self._lost.wait()
        if self._task is not None:
            await asyncio.wait([self._task])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._open.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        method, path = self._parser.get_method().decode(), self._url.partition(b"?")[0].decode()
        exchange = Exchange(self, method, path, self._headers, b"".join(self._body))
        waiting = self._handler(exchange)
        if waiting is not None:
            self._task = asyncio.get_running_loop().create_task(self._answer(waiting))

    async def _answer(self, waiting: Waiting) -> None:
        try:
            await waiting
        except Exception:
            logger.exception("A fake answer failed", extra={"action": "fake_answer_failed"})
            self.transport.close()

    def finish(self) -> None:
        """The reply is whole: keep the connection, unless the client asked otherwise."""
        if not self._parser.should_keep_alive():
            self.transport.close()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.discard(self)
        self._lost.set()
        if self._task is not None:
            self._task.cancel()
