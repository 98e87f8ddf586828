"""What one connection may take: bytes of a head, time for head and body, time to read, a place.

Owns: uvicorn's HTTP protocol with these bounds, its refusals in our envelope, and that an offer to
change the protocol, which is never taken, costs nothing. uvicorn's own has no bounds: a head, whole
or not, would fill the memory, and a client that sends or reads nothing more would stay for ever.
All of it holds before any key is known. Does not own: the size of bodies (`bodies.py`).

One timer looks at all connections, so a request sets no timer of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import time
from enum import Enum, auto
from functools import partial
from typing import Any, cast

import httptools
from prometheus_client import Counter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import envelope
from server.metrics import Series
from server.settings import GatewaySettings

logger = logging.getLogger(__name__)

MOST_HEAD_BYTES = 16 * 1024
MOST_PIPELINED = 16  #: requests of one connection that wait for the answer to an earlier one
SLOWEST_BYTES_PER_SECOND = 1024  #: of a body on its way here, and of a reply that is being taken
_LINGER_SECONDS = 1.0
_LONGEST_BETWEEN_LOOKS_SECONDS = 1.0
_OF_AN_UPGRADE = (b"upgrade", b"http2-settings")


class _HeadTooLong(Exception):
    """Ends the parser's work: there are more bytes of a head than it may have."""


class _TooManyRequests(Exception):
    """Ends the parser's work: more requests wait than may."""


class _Phase(Enum):
    """What a connection waits for."""

    HEAD = auto()  #: its first request, or the rest of a head that has begun
    BODY = auto()  #: the rest of a request's body
    ANSWER = auto()  #: our answer
    REST = auto()  #: the rest of a body that was answered before it was whole
    IDLE = auto()  #: the next request
    CLOSING = auto()  #: the client to take the last bytes


_AT_WORK = (_Phase.BODY, _Phase.ANSWER)
"""Phases in which a request keeps its connection's place."""


class Bounds:
    """The bounds of all connections of one server, and which connections there are."""

    def __init__(self, settings: GatewaySettings, ended: Series[Counter]) -> None:
        self.settings = settings
        self._ended = ended
        self._open: set[BoundedHttpProtocol] = set()
        #: those that have no request at work, the one that has waited longest first
        self._waiting: dict[BoundedHttpProtocol, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        shortest = min(
            settings.head_timeout_seconds,
            settings.body_timeout_seconds,
            settings.write_timeout_seconds,
            settings.keep_alive_timeout_seconds,
        )
        self._between_looks = min(_LONGEST_BETWEEN_LOOKS_SECONDS, shortest / 4)

    def protocol(self) -> Any:
        """What uvicorn makes for each connection."""
        return partial(BoundedHttpProtocol, bounds=self)

    def admit(self, connection: BoundedHttpProtocol) -> bool:
        """Whether there is a place for one more.

        Where there is none, a connection gives up its own: the one that has waited longest without
        a request at work, or else the one whose client has left a reply unread longest. So those
        that send nothing, half a head, or half a body that is answered already, and those that read
        nothing keep nobody out, however many they are; all others have shown a key, or are answered
        at once. There is no limit for one address: behind a proxy all come from one.
        """
        if len(self._open) >= self.settings.max_connections:
            displaced = self._find_displaceable()
            if displaced is None:
                self.count("refused")
                return False
            self.forget(displaced)
            self.count("displaced")
            displaced.transport.abort()
        self._open.add(connection)
        if self._timer is None:
            self._look_later(connection.loop)
        return True

    def _find_displaceable(self) -> BoundedHttpProtocol | None:
        """The connection that loses least: nothing, or else a reply that nobody takes."""
        for connection in self._waiting:
            if not connection.transport.get_write_buffer_size():
                return connection
        paused = (connection for connection in self._open if connection.flow.write_paused)
        unread = {*self._waiting, *paused}
        return min(unread, key=lambda connection: connection.unread_since, default=None)

    def wait(self, connection: BoundedHttpProtocol) -> None:
        """Mark a connection idle: no request of it is being read or answered."""
        if connection in self._open:
            self._waiting.setdefault(connection)

    def work(self, connection: BoundedHttpProtocol) -> None:
        """Mark a connection busy: a request of it is being read or answered."""
        self._waiting.pop(connection, None)

    def forget(self, connection: BoundedHttpProtocol) -> None:
        """Remove a connection that is closed or displaced; its place becomes free."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def count(self, reason: str) -> None:
        """Count a connection that the server ended, by its reason."""
        self._ended.of(reason).inc()

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._between_looks, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        self._timer = None
        try:
            for connection in list(self._open):
                try:
                    connection.look(now)
                except Exception:
                    logger.exception(
                        "Connection not looked at", extra={"action": "connection_look_failed"}
                    )
        finally:
            if self._open:
                self._look_later(loop)


class _HeadFirst:
    """The transport of one reply, whose head leaves together with what follows it.

    uvicorn writes the two apart, and each write wakes the client and whoever reads for it: a tenth
    of what a short answer costs. A head that nothing follows in the same turn of the event loop
    leaves by itself. Everything but writing is the transport's own.
    """

    __slots__ = ("_head", "_holds", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._holds = True  #: what is written first waits
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines((head, data))
        elif self._holds:
            self._holds = False
            self._head = data
            self._loop.call_soon(self.flush)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Let a head go by itself; a client that has gone meanwhile gets none."""
        head, self._head = self._head, b""
        if head:
            with contextlib.suppress(RuntimeError):  # uvloop's, of a transport that has closed
                self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection of a client.

    A head (request line and headers; trailers too) has at most `MOST_HEAD_BYTES`.
    """

    def __init__(self, *args: Any, bounds: Bounds, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._phase = _Phase.HEAD
        self._since = time.monotonic()  #: when the phase began
        self._body_bytes = 0  #: received of the body since then
        self._stalled_since = 0.0  #: while writing is paused, or the connection closes
        self._left_bytes = 0  #: what was to be written then
        self._head_bytes = 0  #: of this request, as far as the parser has told
        self._untold_bytes = 0  #: received since a head was complete, or a piece of a body came
        self._piece_bytes = 0  #: of what is being parsed, as long as it is all of one head
        self._is_too_long = False
        self._is_offer = False  #: the head that was read last offers another protocol
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._bounds.admit(self):
            self._enter(_Phase.HEAD)
        else:
            most = self._bounds.settings.max_connections
            self._refuse(
                503,
                f"{most} connections are busy (gateway.max_connections); try again",
                "too_many_connections",
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)
        self._untold_bytes += len(data)
        self._feed(data)
        # The parser keeps a header to itself until its end, which may never come.
        if self._untold_bytes > MOST_HEAD_BYTES and not self._is_refused:
            self._is_too_long = True
            self.send_400_response("")

    def _feed(self, data: bytes) -> None:
        self._piece_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._pass_over_offer(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("what was sent cannot be read as HTTP")

    def _pass_over_offer(self, rest: bytes) -> None:
        """Read the same request without its offer (RFC 9110, 7.8: a server may ignore it).

        The parser would take all that follows the head for the other protocol, so a new one gets
        the head anew.
        """
        self._is_offer = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is for proxies, and this is none")
            return
        version = self.parser.get_http_version().encode("ascii")
        lines = [method + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(t for t in tokens if t.lower() not in _OF_AN_UPGRADE)
            if name not in _OF_AN_UPGRADE:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # What the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._untold_bytes = self._piece_bytes

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._untold_bytes = 0
        if self.parser.should_upgrade():
            self._is_offer = True
            return
        if len(self.pipeline) >= MOST_PIPELINED:
            raise _TooManyRequests
        self._enter(_Phase.BODY)
        self._body_bytes = 0
        super().on_headers_complete()
        if self.scope["method"] != "HEAD" and not self.expect_100_continue:  # nothing would follow
            joined = _HeadFirst(self.transport, self.loop)
            self.cycle.transport = cast(asyncio.Transport, joined)  # its task begins later

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = self._piece_bytes = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold_bytes = self._piece_bytes = 0
        if self._is_offer:
            return
        if self.cycle.response_complete:
            self._wait()
        else:
            self._enter(_Phase.ANSWER)
        super().on_message_complete()

    def _count(self, told: int) -> None:
        self._head_bytes += told
        if self._head_bytes > MOST_HEAD_BYTES:
            self._is_too_long = True
            raise _HeadTooLong

    # What becomes of the connection

    def on_response_complete(self) -> None:
        """Go on with the next request; uvicorn's own would set a timer for it."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._enter(_Phase.CLOSING)
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._phase is _Phase.BODY:
            self._enter(_Phase.REST)
        elif self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        """Wait for the next request, whose first bytes may have arrived already."""
        self._enter(_Phase.HEAD if self._untold_bytes else _Phase.IDLE)

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._since = time.monotonic()
        if phase in _AT_WORK:
            self._bounds.work(self)
        else:
            self._bounds.wait(self)
        if phase is _Phase.CLOSING and not self.flow.write_paused:
            self._watch_taking()

    @property
    def unread_since(self) -> float:
        """The time since which the client has taken none of the bytes that wait for it."""
        is_watched = self.flow.write_paused or self._phase is _Phase.CLOSING
        return self._stalled_since if is_watched else self._since

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_taking()

    def _watch_taking(self) -> None:
        """Start the clock by which the client has to take the bytes that wait for it."""
        self._stalled_since = time.monotonic()
        self._left_bytes = self.transport.get_write_buffer_size()

    def look(self, now: float) -> None:
        """End the connection where its time is over."""
        settings, waited = self._bounds.settings, now - self._since
        if self.transport.is_closing():
            if self._phase is not _Phase.CLOSING:
                self._enter(_Phase.CLOSING)
            elif self._has_stalled(now, settings.write_timeout_seconds):
                self._abort("write_timeout")
        elif self.flow.write_paused and self._has_stalled(now, settings.write_timeout_seconds):
            self._abort("write_timeout")
        elif self._is_refused:
            pass  # it was told so, and is closed in a moment
        elif self._phase is _Phase.HEAD and waited > settings.head_timeout_seconds:
            self._bounds.count("head_timeout")
            if not self._untold_bytes:
                self._close()  # nothing was asked, so there is nothing to answer
                return
            self._refuse(
                408,
                "request line and headers did not come within "
                f"{settings.head_timeout_seconds:g} s (gateway.head_timeout_seconds)",
                "request_timeout",
            )
        elif self._phase is _Phase.BODY:
            self._look_at_body(now, settings.body_timeout_seconds)
        elif (self._phase is _Phase.REST and waited > settings.body_timeout_seconds) or (
            self._phase is _Phase.IDLE and waited > settings.keep_alive_timeout_seconds
        ):
            self._close()

    def _has_stalled(self, now: float, most_seconds: float) -> bool:
        """Whether the client took too little, over a period, of what waits for it."""
        if now - self._stalled_since <= most_seconds:
            return False
        left = self.transport.get_write_buffer_size()
        taken, self._left_bytes, self._stalled_since = self._left_bytes - left, left, now
        return taken < SLOWEST_BYTES_PER_SECOND * most_seconds

    def _look_at_body(self, now: float, most_seconds: float) -> None:
        if self.flow.read_paused or self.pipeline:
            self._since, self._body_bytes = now, 0  # we are the slower ones
            return
        allowed = most_seconds + self._body_bytes / SLOWEST_BYTES_PER_SECOND
        if now - self._since <= allowed:
            return
        self._bounds.count("body_timeout")
        self._refuse(
            408,
            f"the body did not come whole: it may take {most_seconds:g} s "
            f"(gateway.body_timeout_seconds) and 1 s for each {SLOWEST_BYTES_PER_SECOND} bytes",
            "request_timeout",
        )

    def _abort(self, reason: str) -> None:
        """Let go of all that was to be written, here and in the kernel."""
        self._bounds.count(reason)
        try:
            # The file stays the transport's: a number of its own might not be had any more.
            same = socket.socket(fileno=self.transport.get_extra_info("socket").fileno())
            try:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            finally:
                same.detach()
        finally:
            self.transport.abort()

    def _close(self) -> None:
        self._enter(_Phase.CLOSING)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, and close."""
        if self._is_too_long:
            msg = f"request line and headers have more than {MOST_HEAD_BYTES} bytes together"
            self._refuse(431, msg, "headers_too_large")
        else:
            self._refuse(400, msg, None)

    def _refuse(self, status: int, message: str, code: str | None) -> None:
        self._is_refused = True
        if self._phase is _Phase.ANSWER or self.pipeline:
            # A word here would stand amid an answer, or pass for one: what was asked before is
            # answered, and then it ends.
            last = self.pipeline[0][0] if self.pipeline else self.cycle
            last.keep_alive = False
            return
        if self._phase is _Phase.BODY:
            if self.cycle.response_started:
                self._close()
                return
            self.cycle.disconnected = True  # its route has nobody to answer any more
            self.cycle.message_event.set()
        kind = "service_unavailable" if status == 503 else "invalid_request_error"
        body = json.dumps(envelope(message, type=kind, code=code)).encode()
        again = b"retry-after: 1\r\n" if status == 503 else b""
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\nconnection: close\r\n"
            + again
            + b"\r\n"
            + body
        )
        # Closed at once, with bytes unread, the kernel would take the reply back.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self._close)
