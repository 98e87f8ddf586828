"""Compressed bodies: what `Content-Encoding` says is undone while the body arrives.

Owns: which encodings are read, and that what comes out comes in pieces: whoever reads a body stops
at its own limit, and a few bytes that would become gigabytes never do. Does not own: that limit
(`endpoints/chat.py`, `endpoints/bodies.py`, `endpoints/multipart.py`).
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import Message, Receive, Scope

from feedback.errors import BadRequest
from server.errors import UnsupportedEncoding

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_BYTES = 64 * 1024  #: what comes out at once, at most
MOST_OVERHEAD_BYTES = 1024 * 1024  #: by which what was sent may pass what has come out of it
MOST_FRAMES = 64  #: compressed texts one after the other in a body; each costs a decoder
_WINDOW_LOG = 23  #: of zstd: 8 MiB, which RFC 9659 sets as the largest for HTTP
_GZIP, _ZLIB, _BARE = 31, 15, -15  #: zlib's `wbits`


class Decoder(Protocol):
    """Undoes an encoding, piece by piece."""

    @property
    def ended(self) -> bool: ...

    @property
    def rest(self) -> bytes:
        """What follows the end."""

    def decode(self, data: bytes) -> bytes:
        """At most `PIECE_BYTES` of what `data`, and what was held back before, becomes.

        Empty when there is nothing without more data. Raises `errors`.
        """


class _Library:
    """What the decoders of zlib and of zstd call alike."""

    _decoder: Any

    @property
    def ended(self) -> bool:
        return bool(self._decoder.eof)

    @property
    def rest(self) -> bytes:
        return bytes(self._decoder.unused_data)


class _Zlib(_Library):
    def __init__(self, wbits: int) -> None:
        self._decoder = zlib.decompressobj(wbits)

    def decode(self, data: bytes) -> bytes:
        data = self._decoder.unconsumed_tail + data
        return bytes(self._decoder.decompress(data, PIECE_BYTES))


class _Deflate:
    """With zlib's head, as HTTP has it, or without, as some clients send it."""

    def __init__(self) -> None:
        self._head = b""
        self._decoder: _Zlib | None = None

    @property
    def ended(self) -> bool:
        return self._decoder is not None and self._decoder.ended

    @property
    def rest(self) -> bytes:
        return b"" if self._decoder is None else self._decoder.rest

    def decode(self, data: bytes) -> bytes:
        if self._decoder is None:
            self._head += data
            if len(self._head) < 2:
                return b""
            first, second = self._head[:2]
            has_head = first & 15 == 8 and (first * 256 + second) % 31 == 0
            self._decoder, data = _Zlib(_ZLIB if has_head else _BARE), self._head
        return self._decoder.decode(data)


class _Zstd(_Library):
    def __init__(self) -> None:
        # Imported when the first body comes that needs it. Python has its own from 3.14 on.
        from backports import zstd

        options = {int(zstd.DecompressionParameter.window_log_max): _WINDOW_LOG}
        self._decoder = zstd.ZstdDecompressor(options=options)
        self._error = zstd.ZstdError

    def decode(self, data: bytes) -> bytes:
        try:
            return bytes(self._decoder.decompress(data, PIECE_BYTES))
        except self._error as error:
            raise ValueError(str(error)) from None


_DECODERS: dict[str, Callable[[], Decoder]] = {
    "gzip": lambda: _Zlib(_GZIP),
    "x-gzip": lambda: _Zlib(_GZIP),
    "deflate": _Deflate,
    "zstd": _Zstd,
}
ACCEPTED = ("gzip", "deflate", "zstd")


def find_encoding(scope: Scope) -> str | None:
    """What a request says of its body's encoding, in lower case; None for a body as it is."""
    named = [value for name, value in scope["headers"] if name == b"content-encoding"]
    if not named:
        return None
    found = b",".join(named).decode("latin-1").lower().split(",")
    return ", ".join(name for n in found if (name := n.strip()) not in ("", "identity")) or None


class Decoded:
    """ASGI's `receive` for a body with an encoding: gives the body as it was before."""

    def __init__(self, receive: Receive, encoding: str) -> None:
        self._receive = receive
        self._encoding = encoding
        self._decoder: Decoder | None = None
        self._frames = 0
        self._data = b""  #: received and not given to the decoder yet
        self._holds = False  #: the decoder may have more without more data
        self._is_last = False  #: no more of the body will be received
        self._is_done = False  #: its end was given on
        self._taken = self._given = 0

    async def __call__(self) -> Message:
        """The next piece. Raises UnsupportedEncoding, BadRequest."""
        while not self._is_done:
            if self._data or self._holds:
                piece = self._decode()
                if piece:
                    return {"type": "http.request", "body": piece, "more_body": True}
                continue
            if self._is_last:
                return self._end()
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._data = message.get("body", b"")
            self._taken += len(self._data)
            self._is_last = not message.get("more_body", False)
            if self._data and self._encoding not in _DECODERS:
                raise UnsupportedEncoding(self._encoding, ACCEPTED)
        return await self._receive()  # whether the client is still there

    def _decode(self) -> bytes:
        if self._decoder is None or self._decoder.ended:
            if self._decoder is not None and self._encoding == "deflate":
                raise self._broken("something follows its end")
            self._frames += 1
            if self._frames > MOST_FRAMES:
                raise self._broken(f"it has more than {MOST_FRAMES} parts")
            self._decoder = _DECODERS[self._encoding]()
        data, self._data = self._data, b""
        try:
            piece = self._decoder.decode(data)
        except (ValueError, zlib.error) as error:
            raise self._broken(str(error)) from None
        self._given += len(piece)
        if self._taken - self._given > MOST_OVERHEAD_BYTES:
            raise self._broken("it is larger than what comes out of it")
        self._holds = bool(piece) and not self._decoder.ended
        if self._decoder.ended:
            self._data = self._decoder.rest
        return piece

    def _end(self) -> Message:
        if self._decoder is not None and not self._decoder.ended:
            raise self._broken("its end is missing")
        self._is_done = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _broken(self, why: str) -> BadRequest:
        return BadRequest(f"the body cannot be read as {self._encoding}: {why}")
