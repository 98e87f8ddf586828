"""Whether an engine makes of a chat what the base's own template makes of it, and reads as much.

An engine that is given by URL may have been started with another template or a shorter context.
Then it answers other prompts than training and evaluations render, and no answer shows it. Owns:
what is asked of an engine that was just met, and the reason that people read. Does not own: which
engines get traffic (`conductor.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from server.engines.base import Engine, EngineRefused
from tuner.base_models import BaseModel
from tuner.chat_template import TemplateRefused

logger = logging.getLogger(__name__)

_ASK = {"role": "user", "content": "Name a bird: ä 鳥"}
_CONVERSATIONS: Sequence[Sequence[Mapping[str, Any]]] = (
    [_ASK],  # templates may put a system message of their own before it
    [
        {"role": "system", "content": "Be brief."},
        _ASK,
        {"role": "assistant", "content": "A heron."},
        {"role": "user", "content": "Another one."},
    ],
)
_DAYS = (0, -1, 1)
"""Templates may write the date, and an engine elsewhere may have yesterday's or tomorrow's."""


@dataclass(frozen=True)
class SamePrompt:
    """What an engine of this base has to agree with."""

    base: BaseModel
    min_model_len: int  #: tokens; the shortest context that training and the gateway count on

    async def find_difference(self, engine: Engine) -> str | None:
        """Why the engine may not answer, and what to do; None where it may.

        Asks it for a few token ids: for engines that were just met, not for each request. An engine
        that has no `/tokenize` can't be asked, and passes with a warning.
        """
        length = engine.max_model_len
        if length is not None and length < self.min_model_len:
            return (
                f"it reads at most {length} tokens, and {self.min_model_len} are counted on: start "
                f"it with --max-model-len {self.min_model_len}, or set engine.max_model_len to "
                f"{length}"
            )
        try:
            for messages in _CONVERSATIONS:
                if not await self._renders_alike(engine, messages):
                    return (
                        f"it renders chats by another template than {self.base.name!r} has here: "
                        "start it with the gateway's files of the base, without --chat-template"
                    )
        except EngineRefused as refused:
            if refused.status not in (404, 405):
                raise
            logger.warning(
                "Engine's chat template not checked: it has no /tokenize",
                extra={"action": "template_not_checked", "engine": engine.address.id},
            )
        return None

    async def _renders_alike(self, engine: Engine, messages: Sequence[Mapping[str, Any]]) -> bool:
        try:
            texts = list(dict.fromkeys(self._render(messages)))
        except TemplateRefused:
            return True  # nobody is served such a conversation
        try:
            served = await engine.tokenize(self.base.name, messages)
        except EngineRefused as refused:
            if refused.status == 400:  # its template takes no such conversation
                return False
            raise
        for text in texts:
            if await engine.tokenize_text(self.base.name, text) == served:
                return True
        return False

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        present = datetime.now(UTC).astimezone()
        for days in _DAYS:
            yield self.base.chat_template.render(
                messages, add_generation_prompt=True, at=present + timedelta(days=days)
            )
