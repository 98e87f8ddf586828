"""What is not read: requests whose head is too long.

Owns: uvicorn's HTTP protocol with a bound, and its refusals in our envelope. uvicorn's own has
none: the head of a request, complete or not, would fill the memory. Does not own: bodies
(`endpoints/bodies.py`).
"""

from __future__ import annotations

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import envelope

MOST_HEAD_BYTES = 16 * 1024
_LINGER_SECONDS = 1.0


class _HeadTooLong(Exception):
    """Ends the parser's work."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Reads heads (request line and headers, trailers too) up to `MOST_HEAD_BYTES`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # of this request, as far as the parser has told
        self._untold_bytes = 0  # received since a head was complete, or a piece of a body came
        self._piece_bytes = 0  # of what is being parsed, as long as it is all of one head
        self._is_too_long = False
        self._is_refused = False

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._untold_bytes += len(data)
        self._piece_bytes = len(data)
        super().data_received(data)
        # The parser keeps a header to itself until its end, which may never come.
        if self._untold_bytes > MOST_HEAD_BYTES and not self._is_refused:
            self._is_too_long = True
            self.send_400_response("")

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
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = self._piece_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold_bytes = self._piece_bytes = 0
        super().on_message_complete()

    def _count(self, told: int) -> None:
        self._head_bytes += told
        if self._head_bytes > MOST_HEAD_BYTES:
            self._is_too_long = True
            raise _HeadTooLong

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read, and close."""
        self._is_refused = True
        status, code = (431, "headers_too_large") if self._is_too_long else (400, None)
        if self._is_too_long:
            msg = f"request line and headers have more than {MOST_HEAD_BYTES} bytes together"
        body = json.dumps(envelope(msg, type="invalid_request_error", code=code)).encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\nconnection: close\r\n\r\n"
            + body
        )
        # Closed at once, with bytes unread, the kernel would take the reply back.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
