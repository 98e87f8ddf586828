"""Hostile heads: too long, too many at once, of no HTTP. None of them needs a key."""

from __future__ import annotations

from tests.promises.hostile.sending import Hostile, raw

START = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
SHORT = b"GET /healthz HTTP/1.1\r\nhost:x\r\n\r\n"

CORPUS: list[Hostile] = [
    raw("one long header", START + b"x-long: " + b"a" * 64 * 1024 + b"\r\n\r\n"),
    raw("a header without an end", START + b"x-endless: ", *[b"a" * 40_000] * 8),
    raw("many headers", START, *[b"x-many: 1234567890\r\n" * 100] * 20),
    raw("a long path", b"GET /" + b"a" * 64 * 1024, b" HTTP/1.1\r\n\r\n"),
    raw(
        "long trailers",
        b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
        b"1\r\na\r\n0\r\n" + b"x-trailer: a\r\n" * 2000 + b"\r\n",
    ),
    raw("no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 1000),
    raw("HTTP/2 at once", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 10_000),
]
