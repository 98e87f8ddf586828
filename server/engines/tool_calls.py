"""Whether the engines call tools, asked once of each engine process.

Owns: the question and how long its answer holds. Does not own: which parser a base needs
(`tool_parsers.py`), or what becomes of a request with tools (`server/chat/request.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.engines.base import EngineError
from server.engines.chooser import Chooser, Replica
from server.engines.picture import EngineView

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  #: longest wait for an engine to say it
RETRY_SECONDS = 15.0  #: pause before an engine that did not tell is asked again


@dataclass(slots=True)
class _Known:
    """What one engine process has said."""

    replica: Replica
    boot_id: str | None
    parses: bool | None = None  #: None: not known yet
    asked: asyncio.Task[None] | None = None  #: the question, which all who wait share
    retry_at: float = 0.0  #: when it may be asked again, where it had no answer


class ToolCalls:
    """Asks the engines of a chooser's picture."""

    def __init__(self, chooser: Chooser, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._chooser = chooser
        self._monotonic = monotonic
        self._known: dict[str, _Known] = {}  #: by engine id

    async def are_parsed(self) -> bool | None:
        """Whether every engine that is ready calls tools; None where one of them doesn't tell."""
        self._drop_gone()
        replicas = self._chooser.replicas
        ready = [(engine, replicas[engine.id]) for engine in self._chooser.picture.ready]
        found = await asyncio.gather(*(self._parses(*one) for one in ready))
        return False if False in found else None if None in found or not found else True

    async def _parses(self, engine: EngineView, replica: Replica) -> bool | None:
        known = self._known.get(engine.id)
        if known is None or known.replica is not replica or known.boot_id != engine.boot_id:
            known = self._known[engine.id] = _Known(replica, engine.boot_id)
        if known.parses is None and known.retry_at <= self._monotonic():
            if known.asked is None or known.asked.done():
                known.asked = asyncio.create_task(self._ask(known))
            await asyncio.wait([known.asked])
        return known.parses

    async def _ask(self, known: _Known) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                known.parses = await known.replica.engine.parses_tools(
                    self._chooser.picture.base_name
                )
        except (EngineError, TimeoutError) as error:
            logger.info(
                "Engine does not tell whether it calls tools",
                extra={
                    "action": "tools_unknown",
                    "engine": known.replica.id,
                    "reason": str(error) or type(error).__name__,
                },
            )
        known.retry_at = self._monotonic() + RETRY_SECONDS

    def _drop_gone(self) -> None:
        for gone in self._known.keys() - self._chooser.replicas.keys():
            del self._known[gone]

    async def close(self) -> None:
        """End the questions that are under way."""
        asked = [known.asked for known in self._known.values() if known.asked is not None]
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
