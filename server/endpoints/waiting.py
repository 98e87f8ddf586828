"""Requests that wait for work in the background.

Owns: the wait. It holds neither a session nor a thread between two looks, and ends when the client
goes away or the gateway shuts down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from sqlalchemy.orm import Session

from server.gateway import Gateway

T = TypeVar("T", bound=Mapping[str, Any])

PENDING = ("queued", "running")
LOOK_SECONDS = 0.2


async def wait_while_pending(
    request: Request,
    gateway: Gateway,
    look: Callable[[Session], T],
    *,
    seconds: float,
) -> T:
    """What `look` last found: an object whose `status` is no longer pending, or time was up."""

    def read() -> T:
        with gateway.database.read() as session:
            return look(session)

    deadline = time.monotonic() + seconds
    while True:
        found = await asyncio.to_thread(read)
        left = deadline - time.monotonic()
        if found["status"] not in PENDING or left <= 0 or gateway.stopping:
            return found
        if await request.is_disconnected():
            return found
        await asyncio.sleep(min(LOOK_SECONDS, left))
