"""Hostile heads and connections: too long, too slow, too many, of no HTTP."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import httpx

from tests.promises.hostile.sending import Hostile, Target, raw

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

PATIENCE = {
    "BURNISH_GATEWAY__HEAD_TIMEOUT_SECONDS": "0.5",
    "BURNISH_GATEWAY__BODY_TIMEOUT_SECONDS": "0.5",
    "BURNISH_GATEWAY__WRITE_TIMEOUT_SECONDS": "0.5",
    "BURNISH_GATEWAY__KEEP_ALIVE_TIMEOUT_SECONDS": "0.5",
    "BURNISH_GATEWAY__MAX_CONNECTIONS": "300",
}
"""Settings under which what is slow below is found out soon."""


def _crowd(name: str, *, connections: int, begun: bytes) -> Hostile:
    """Many connections at once, each with the same beginning; the last one asks properly."""

    def send(target: Target) -> int:
        address = urlsplit(target.url)
        with ExitStack() as stack:
            for _ in range(connections):
                place = (address.hostname, address.port)
                opened = stack.enter_context(socket.create_connection(place, timeout=30))
                with suppress(ConnectionError):  # it was displaced already
                    opened.sendall(begun)
            return httpx.get(f"{target.url}/healthz", trust_env=False, timeout=30).status_code

    return Hostile(name, send)


CORPUS += [
    raw("a head that stops", START),
    raw("a word that stops", b"GE"),
    raw("nothing at all"),
    raw(
        "a body that stops",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer KEY\r\n"
        b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{",
    ),
    raw(
        "a body for nobody",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000000\r\n\r\n",
        *[b"x" * 100_000] * 20,
    ),
    raw("requests one behind the other", SHORT * 8_000),
    _crowd(
        "900 connections with half a head", connections=900, begun=START + b"x: " + b"a" * 15_000
    ),
    _crowd("900 connections without a word", connections=900, begun=b""),
]
