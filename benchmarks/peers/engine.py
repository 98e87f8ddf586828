"""The engine behind `benchmarks/gateway.py`: vLLM's bytes, at once, for as little time as possible.

`python -P benchmarks/peers/engine.py --port 8001 --chunks 32`

It shares the machine with what is measured, so it must cost next to nothing: each reply is made of
bytes that were written once (by the fake engine's `answers`, which tests compare with a real vLLM),
and the request is searched, not parsed. Plain answers come whole; those of a stream chunk by chunk,
one in a turn of the event loop. No adapters, no faults: that is the fake engine's work.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import uuid
from collections.abc import Iterator
from typing import cast

import uvloop

from tests.fake_engine.answers import Answer, compact, model_card

MODEL = "tiny"
CREATED = 1_700_000_000
_ID = "<id>"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"\r\nx-request-id: *([!-~]+)", re.IGNORECASE)
_STREAM = re.compile(rb'"stream": ?true')
_USAGE = re.compile(rb'"include_usage": ?true')
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def reply(status: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Replies:
    """What this engine says, with the id of an answer left open."""

    def __init__(self, chunks: int) -> None:
        answer = Answer(
            chat=True,
            id=_ID,
            model=MODEL,
            created=CREATED,
            choices=[[f" word{at:02d}" for at in range(chunks)]],
            prompt_tokens=40,
            cut=False,
        )
        self._whole = answer.whole().split(_ID.encode())
        self._events = {usage: self._stream(answer, usage) for usage in (False, True)}
        card = model_card(MODEL, f"/models/{MODEL}", None, 8192, CREATED)
        self._others = {
            b"/health": reply("200 OK", b""),
            b"/metrics": reply("200 OK", b"process_start_time_seconds 1.7e+09\n", "text/plain"),
            b"/version": reply("200 OK", b'{"version":"0.32.0"}'),
            b"/v1/models": reply("200 OK", compact({"object": "list", "data": [card]})),
        }

    @staticmethod
    def _stream(answer: Answer, usage: bool) -> list[list[bytes]]:
        """Events, each split where the id stands."""
        steps = [event for events in answer.steps(usage_follows=usage) for event in events]
        events = [*answer.opening(), *steps, *answer.closing(usage=usage)]
        return [event.split(_ID.encode()) for event in events]

    def whole(self, number: bytes) -> bytes:
        return reply("200 OK", number.join(self._whole))

    def stream(self, number: bytes, usage: bool) -> Iterator[bytes]:
        yield _STREAM_HEAD
        for parts in self._events[usage]:
            event = number.join(parts)
            yield b"%x\r\n%b\r\n" % (len(event), event)
        yield b"0\r\n\r\n"

    def other(self, path: bytes) -> bytes:
        return self._others.get(path) or reply("404 Not Found", b'{"detail":"Not Found"}')


class Connection(asyncio.Protocol):
    """One client; one request at a time."""

    def __init__(self, replies: Replies) -> None:
        self._loop = asyncio.get_running_loop()
        self._replies = replies
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._writes: Iterator[bytes] | None = None  #: of a stream that is under way
        self._is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._write_on()

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(received, 0, end)
        if len(received) - end - 4 < (int(length[1]) if length else 0):
            return
        self._received = b""
        self._answer(received[:end], received)

    def _answer(self, head: bytes, request: bytes) -> None:
        assert self._transport is not None
        path = head.split(b" ", 2)[1]
        if path != b"/v1/chat/completions":
            self._transport.write(self._replies.other(path))
            return
        number = _REQUEST_ID.search(head)
        answer = b"chatcmpl-" + (number[1] if number else uuid.uuid4().hex.encode())
        if _STREAM.search(request, len(head)) is None:
            self._transport.write(self._replies.whole(answer))
            return
        usage = _USAGE.search(request, len(head)) is not None
        self._writes = self._replies.stream(answer, usage)
        self._write_on()

    def _write_on(self) -> None:
        if self._writes is None or self._is_paused or self._transport is None:
            return
        piece = next(self._writes, None)
        if piece is None:
            self._writes = None
        else:
            self._transport.write(piece)
            self._loop.call_soon(self._write_on)


async def serve(port: int, replies: Replies) -> None:
    """Answer on 127.0.0.1 until the process ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(replies), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=32, help="tokens of an answer")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options.port, Replies(options.chunks)))


if __name__ == "__main__":
    main()
