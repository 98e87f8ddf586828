"""Uploads under way in this gateway: how many at once, and whose turn it is.

Owns: bounds on what uploads hold here (connections, disk, children that read). Does not own: what
is read, or how much one user may keep (`feedback/uploads.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from feedback.errors import RateLimited

MOST_OF_ONE_USER = 4  #: received, waiting or read
READERS = 2  #: files that are read at the same time, each of another user

_RETRY_SECONDS = 5


class Intake:
    """One per gateway, used from its event loop alone."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Lock] = {}
        self._readers = asyncio.Semaphore(READERS)

    @contextmanager
    def admit(self, user: str) -> Iterator[None]:
        """Count an upload as long as the block lasts. Raises RateLimited for one too many."""
        if self._under_way[user] >= MOST_OF_ONE_USER:
            raise RateLimited(
                f"{user!r} has {MOST_OF_ONE_USER} uploads under way, which is the limit; wait for "
                "one of them",
                retry_after_seconds=_RETRY_SECONDS,
            )
        self._under_way[user] += 1
        try:
            yield
        finally:
            self._under_way[user] -= 1
            if not self._under_way[user]:
                del self._under_way[user]
                self._turns.pop(user, None)

    @asynccontextmanager
    async def turn(self, user: str) -> AsyncIterator[None]:
        """Wait until a file of an admitted user may be read; nobody takes all readers."""
        async with self._turns.setdefault(user, asyncio.Lock()), self._readers:
            yield
