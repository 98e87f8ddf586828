"""What a hostile input is: a name, and how it is sent to a gateway that runs."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PATIENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Target:
    """A gateway at `url`, and the key of an administrator."""

    url: str
    key: str


@dataclass(frozen=True)
class Hostile:
    """One input. `send` returns the last status that came back; None where the gateway hung up."""

    name: str
    send: Callable[[Target], int | None]
    statuses: range = range(200, 500)  #: what may come back: answered or refused, never a fault


def request(
    name: str,
    path: str,
    content: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "POST",
) -> Hostile:
    """A body, JSON unless `headers` say otherwise, with the key."""

    def send(target: Target) -> int:
        sent = {"content-type": "application/json", **(headers or {})}
        sent["authorization"] = f"Bearer {target.key}"
        with httpx.Client(trust_env=False, timeout=PATIENCE_SECONDS) as client:
            reply = client.request(method, target.url + path, content=content, headers=sent)
        assert reply.status_code < 400 or reply.json()["error"].keys() == {
            "message",
            "type",
            "param",
            "code",
        }
        return reply.status_code

    return Hostile(name, send)


def upload(name: str, filename: str, content: bytes, **fields: str) -> Hostile:
    """A file for `/v1/files`."""

    def send(target: Target) -> int:
        headers = {"authorization": f"Bearer {target.key}"}
        with httpx.Client(trust_env=False, timeout=PATIENCE_SECONDS, headers=headers) as client:
            reply = client.post(
                f"{target.url}/v1/files",
                files={"file": (filename, content)},
                data={"purpose": "fine-tune", **fields},
            )
        return reply.status_code

    return Hostile(name, send)


def raw(name: str, *pieces: bytes) -> Hostile:
    """Bytes on a socket; `KEY` in them is replaced by the key. Read until the gateway ends it."""

    def send(target: Target) -> int | None:
        address = urlsplit(target.url)
        received = b""
        with socket.create_connection(
            (address.hostname, address.port), timeout=PATIENCE_SECONDS
        ) as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece.replace(b"KEY", target.key.encode()))
                while more := connection.recv(65536):
                    received = (received + more)[-1_000_000:]
            except ConnectionError:
                pass  # it hung up with bytes of ours unread
        found = re.findall(rb"HTTP/1\.1 (\d{3})", received)
        return int(found[-1]) if found else None

    return Hostile(name, send)
