"""Heads of requests that are too long, or none."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from server.bounds import MOST_HEAD_BYTES
from tests.gateway_fixtures import RunningGateway


def exchange(gateway: RunningGateway, *pieces: bytes) -> tuple[int, dict[str, str | None]]:
    """Status and error of the last reply to raw bytes."""
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = b""
        while more := connection.recv(65536):
            received += more
    head, _, body = received.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    return int(head.split()[0]), json.loads(body)["error"]


START = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (START, b"x-long: " + b"a" * 64 * 1024 + b"\r\n\r\n"),
        (START, b"x-endless: ", b"a" * 40_000, b"a" * 40_000),
        (START, *[b"x-many: 1234567890\r\n" * 100] * 20),
        (b"GET /" + b"a" * 64 * 1024, b" HTTP/1.1\r\n\r\n"),
        (
            b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n",
            b"1\r\na\r\n0\r\n" + b"x-trailer: a\r\n" * 2000 + b"\r\n",
        ),
    ],
    ids=["one header", "without an end", "many", "path", "trailers"],
)
def test_a_head_beyond_the_bound_is_refused_in_the_envelope(
    sqlite_gateway: RunningGateway, pieces: tuple[bytes, ...]
) -> None:
    status, error = exchange(sqlite_gateway, *pieces)
    assert (status, error["code"]) == (431, "headers_too_large")
    assert str(MOST_HEAD_BYTES) in (error["message"] or "")


def test_what_is_no_http_is_refused_in_the_envelope(sqlite_gateway: RunningGateway) -> None:
    status, error = exchange(sqlite_gateway, b"NONSENSE\r\n\r\n")
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_requests_within_the_bound_share_a_connection_with_large_bodies(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client()
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    body |= {"x_padding": "a" * 200_000}
    for _ in range(3):
        headers = {"x-long": "a" * 15_000}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert client.get("/healthz", headers=headers).status_code == 200


def test_other_clients_are_answered_while_one_never_ends_its_head(
    sqlite_gateway: RunningGateway,
) -> None:
    address = urlsplit(sqlite_gateway.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(START)
        assert httpx.get(f"{sqlite_gateway.url}/healthz", trust_env=False).status_code == 200
