"""Kept connections to one engine, for the requests that people wait for.

Owns: HTTP/1.1 on a socket, as far as a POST to vLLM needs it: connections that are used again,
bounded buffers, a limit to silence. A kept connection that ends before a byte of the reply has come
is no failure of the engine: the request goes out once more, on a new one. Parsing is httptools'.
aiohttp, which asks everything else (`vllm.py`), does more for a request than is needed here;
decision 0011 has the figures. Does not own: what an answer means, other retries.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools

from server.engines.base import EngineReply, EngineUnreachable

CONNECT_SECONDS = 5.0
#: Below the 5 s after which vLLM closes an idle connection, so that no request is sent into a
#: closing one.
KEEP_ALIVE_SECONDS = 3.0
MOST_BUFFERED_BYTES = 64 * 1024  #: of a reply that its reader doesn't take; then nothing is read


class Connections:
    """Connections to one server, `url` with or without a path before its routes."""

    def __init__(self, engine_id: str, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        self._engine_id = engine_id
        self._host = parts.hostname or ""
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._path = parts.path.rstrip("/")
        always = {"Host": parts.netloc.rpartition("@")[2], **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in always.items())
        self._idle: deque[_Connection] = deque()
        self._is_closed = False

    def post(
        self, path: str, body: bytes, *, headers: Mapping[str, str], timeout_seconds: float
    ) -> Posted:
        """One request; see `Engine.post`."""
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}{more}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return Posted(self, head.encode("latin-1") + body, timeout_seconds)

    def close(self) -> None:
        """Close what is idle; what is in use closes when its request ends."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    def take_kept(self) -> _Connection | None:
        """An idle connection, the one used last; None where there is none."""
        freshest = asyncio.get_running_loop().time() - KEEP_ALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since > freshest:
                return connection
            connection.close()
        return None

    async def connect(self) -> _Connection:
        """A new connection. Raises EngineUnreachable."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, made = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=self._ssl
                )
        except TimeoutError as error:
            raise self.unreachable(f"no connection within {CONNECT_SECONDS:g} s") from error
        except OSError as error:  # of TLS too
            raise self.unreachable(error) from error
        return made

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection whose reply has come whole, or close it."""
        if self._is_closed or not connection.may_be_kept():
            connection.close()
            return
        now = connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)
        while self._idle and self._idle[0].idle_since <= now - KEEP_ALIVE_SECONDS:
            self._idle.popleft().close()

    def unreachable(self, error: BaseException | str) -> EngineUnreachable:
        said = error if isinstance(error, str) else f"{type(error).__name__}: {_said(error)}"
        return EngineUnreachable(f"engine {self._engine_id!r}: {said}")


class Posted:
    """A request and its reply: `async with` sends it and gives the reply when that begins.

    Leaving before the reply's end was read closes the connection.
    """

    __slots__ = ("_connection", "_connections", "_is_read", "_request", "_timeout")

    def __init__(self, connections: Connections, request: bytes, timeout_seconds: float) -> None:
        self._connections = connections
        self._request = request
        self._timeout = timeout_seconds
        self._connection: _Connection | None = None
        self._is_read = False

    async def __aenter__(self) -> EngineReply:
        connection = self._connections.take_kept()
        if connection is not None and await self._ask(connection):
            return self._begin(connection)
        connection = await self._connections.connect()
        if not await self._ask(connection):
            raise self._connections.unreachable(connection.failure or "no reply began")
        return self._begin(connection)

    async def _ask(self, connection: _Connection) -> bool:
        """Send the request and wait for the head of its reply.

        False where the connection ended before a byte of it came. Raises EngineUnreachable for
        every other failure.
        """
        try:
            connection.ask(self._request, self._timeout)
            while connection.status is None:
                if connection.failure is not None:
                    if connection.ended_unheard:
                        return False
                    raise self._connections.unreachable(connection.failure)
                await connection.news()
        except BaseException:
            connection.close()
            raise
        return True

    def _begin(self, connection: _Connection) -> EngineReply:
        assert connection.status is not None
        self._connection = connection
        return EngineReply(connection.status, connection.headers, self)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._connection is not None
        if self._is_read:
            self._connections.give_back(self._connection)
        else:
            self._connection.close()

    def __aiter__(self) -> Posted:
        return self

    async def __anext__(self) -> bytes:
        """What has come of the body since the last time."""
        connection = self._connection
        assert connection is not None
        while not connection.pieces:
            if connection.is_complete:
                self._is_read = True
                raise StopAsyncIteration
            if connection.failure is not None:
                raise self._connections.unreachable(connection.failure)
            await connection.news()
        return connection.take_pieces()


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._news: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._silence_seconds = 0.0
        self._heard_at = 0.0
        self._is_paused = False
        self._buffered = 0
        self._ends_with_connection = False
        self._may_be_kept = False
        self._has_heard = False
        self._was_lost = False
        self.idle_since = 0.0
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.is_complete = True
        self.failure: str | None = None

    @property
    def is_open(self) -> bool:
        return (
            self.failure is None
            and self._transport is not None
            and not self._transport.is_closing()
        )

    @property
    def ended_unheard(self) -> bool:
        """The other side ended the connection before it said anything to the present request."""
        return self._was_lost and not self._has_heard

    def ask(self, request: bytes, silence_seconds: float) -> None:
        """Send a request; after `silence_seconds` in which nothing comes it has failed."""
        assert self._transport is not None
        self.status, self.headers, self.is_complete = None, {}, False
        self._ends_with_connection = self._may_be_kept = self._is_paused = False
        self._has_heard = False
        self.pieces, self._buffered = [], 0
        self._parser = httptools.HttpResponseParser(self)
        self._silence_seconds = silence_seconds
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(silence_seconds, self._check_silence)
        self._transport.write(request)

    def news(self) -> asyncio.Future[None]:
        """Done when something has come. One waits at a time."""
        self._news = self._loop.create_future()
        return self._news

    def take_pieces(self) -> bytes:
        pieces, self.pieces, self._buffered = self.pieces, [], 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._heard_at = self._loop.time()
            self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def may_be_kept(self) -> bool:
        is_read = self.is_complete and not self.pieces and not self._is_paused
        return is_read and self.is_open and self._may_be_kept

    def close(self) -> None:
        self._stop_timer()
        self.pieces.clear()
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self._has_heard = True
        if self._parser is None or self.is_complete:
            self._fail("it sent what nobody asked for")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"its reply is not HTTP: {error}")
            return
        if self._buffered > MOST_BUFFERED_BYTES and not self._is_paused:
            assert self._transport is not None
            self._is_paused = True
            self._transport.pause_reading()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if not self.is_complete and self._ends_with_connection and exc is None:
            self.is_complete = True
        # Silence and nonsense have been named before; then it was we who ended it.
        self._was_lost = self.failure is None
        self.failure = self.failure or f"the connection ended{f': {exc}' if exc else ''}"
        self._tell()

    def _check_silence(self) -> None:
        left = self._heard_at + self._silence_seconds - self._loop.time()
        if self._is_paused:
            left = self._silence_seconds  # the reader is slow, not the engine
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_silence)
        else:
            self._fail(f"it was silent for {self._silence_seconds:g} s")

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()
        self._tell()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        news, self._news = self._news, None
        if news is not None and not news.done():
            news.set_result(None)

    # httptools' side

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        self._ends_with_connection = not self.headers.keys() & {
            "content-length",
            "transfer-encoding",
        }

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self.is_complete = True
        # Said of this reply only here: afterwards the parser is ready for the next one.
        self._may_be_kept = bool(self._parser.should_keep_alive())
        self._stop_timer()


def _said(error: BaseException) -> str:
    """What went wrong, without the address that the system's own words repeat: callers read it."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        known = os.strerror(error.errno) if error.errno > 0 else error.strerror
        return known or "no connection"
    return str(error)
