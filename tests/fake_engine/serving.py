"""The fake engine under uvicorn, in a loop that ends within a millisecond.

Owns: the connections, and what an ASGI application can't do by itself: close one in mid-answer as a
dying engine does, and stop working once its client has gone. Does not own: what is answered.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterable
from functools import partial

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

_HANG_UP = "fake_engine.hang_up"
_STREAM_HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


class _Connection(HttpToolsProtocol):
    """uvicorn's connection, which an application can close (`hang_up`)."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_HANG_UP: self.transport.close}


async def serve(app: ASGIApp, listener: socket.socket, ended: threading.Event) -> None:
    """Answer until `ended` is set; then close every connection, whatever is still to be sent.

    Not `uvicorn.Server`, which looks ten times a second whether it shall end: every test of the
    gateway would wait for that.
    """
    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    config.load()
    state = ServerState()
    state.default_headers = config.encoded_headers
    server = await asyncio.get_running_loop().create_server(
        partial(_Connection, config, state, {}), sock=listener
    )
    await asyncio.to_thread(ended.wait)
    server.close()
    # Whatever a client hasn't read yet would keep its connection open beyond the loop's end.
    for connection in list(state.connections):
        connection.transport.abort()
    while state.connections or state.tasks:
        await asyncio.sleep(0)


async def start_stream(send: Send) -> None:
    """Answer 200 with server-sent events, which `send_events` delivers."""
    await send(_STREAM_HEAD)


async def send_events(send: Send, events: Iterable[bytes], *, last: bool = False) -> None:
    """Deliver events, each in an HTTP chunk of its own; with `last` the stream ends."""
    for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    if last:
        await send({"type": "http.response.body"})


async def hang_up(scope: Scope, receive: Receive, _send: Send) -> None:
    """Close the connection, whatever the client still waits for."""
    scope["extensions"][_HANG_UP]()
    await _wait_until_gone(receive)


def while_connected(app: ASGIApp) -> ASGIApp:
    """`app`, cancelled when its client goes; the request's body has been read before."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(app(scope, receive, send))
        leaving = asyncio.ensure_future(_wait_until_gone(receive))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        answering.cancel()
        leaving.cancel()
        await asyncio.wait((answering, leaving))
        if not answering.cancelled():
            answering.result()

    return run


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
