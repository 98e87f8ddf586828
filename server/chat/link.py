"""The gateway's end of the socket to its writer.

Owns: what is sent when, and how long the writer has said nothing. Does not own: which rows there
are, or who waits for them (`recorder.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import cast

from server.chat.frames import (
    FRAME,
    SETUP,
    Report,
    report_json,
)

MOST_UNDER_WAY = 2  #: portions of rows that are with the writer


class Link(asyncio.Protocol):
    """The gateway's end: `on_report` hears of each group, `on_end` that the writer has ended."""

    def __init__(self, on_report: Callable[[Report], None], on_end: Callable[[Link], None]) -> None:
        self._on_report = on_report
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._unsent: dict[int, tuple[bytes, bytes]] = {}  #: head and body by number, in order
        self._queued_bytes = 0  #: of `_unsent`
        self._sent = self._settled = 0  # rows
        #: how many rows were sent by the end of each portion, and when it was written
        self._under_way: deque[tuple[int, float]] = deque()
        self._heard_at = 0.0
        self._transport: asyncio.Transport | None = None
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()

    def send(self, kind: int, number: int, body: bytes) -> None:
        """Queue a frame; what a turn of the event loop queues is written in one go.

        While the writer has one portion under way and another to go on with, nothing more is
        written: each write would wake it, and it can't begin any sooner.
        """
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent[number] = FRAME.pack(kind, number, len(body)), body
        self._queued_bytes += FRAME.size + len(body)
        self._sent += kind != SETUP

    def withdraw(self, number: int) -> bool:
        """Take a row's frame out of the queue; False where it was written or never queued."""
        frame = self._unsent.pop(number, None)
        if frame is None:
            return False
        self._queued_bytes -= FRAME.size + len(frame[1])
        self._sent -= 1
        return True

    def _flush(self) -> None:
        if self._unsent and len(self._under_way) < MOST_UNDER_WAY:
            self._write()

    def _write(self) -> None:
        assert self._transport is not None
        self._under_way.append((self._sent, self._loop.time()))
        self._transport.write(b"".join(chain.from_iterable(self._unsent.values())))
        self._unsent.clear()
        self._queued_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        assert self._transport is not None
        return self._queued_bytes + self._transport.get_write_buffer_size()

    def silent_seconds(self) -> float:
        """For how long the writer has had rows without saying anything."""
        if not self._under_way:
            return 0.0
        return self._loop.time() - max(self._under_way[0][1], self._heard_at)

    def finish(self) -> None:
        """Nothing more is sent; what comes is still heard."""
        assert self._transport is not None
        if not self._transport.is_closing():
            self._write()
            self._transport.write_eof()

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        lines = (self._received + data).split(b"\n")
        self._received = lines.pop()
        for line in lines:
            report = report_json.validate_json(line)
            self._settled += report.settled
            self._on_report(report)
        while self._under_way and self._under_way[0][0] <= self._settled:
            self._under_way.popleft()
        self._flush()
        self.ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        self.ready.set()
        self._on_end(self)
