"""Removes what deleted things leave outside of their own rows.

Owns: SQLite's write-ahead log after a deletion, dead letters of answers that are gone, kept replies
that are a day old. Covered: a deletion through another gateway; a log that somebody reads just
then. Does not own: what a deletion takes along in the database (`feedback/answers.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import select

from feedback.db import Database
from feedback.tables import Answer
from server.chat.dead_letters import remove_letters
from server.http.idempotency import MOST_REMOVED, remove_old

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
SWEEP_SECONDS = 3600.0


class Remains:
    """Clears up after deletions, and every hour. Its methods but `follow` block."""

    def __init__(self, database: Database, dead_letters: Path) -> None:
        self._database = database
        self._dead_letters = dead_letters
        self._log_is_due = False

    def forget(self, answer_ids: Collection[str]) -> None:
        """Call it after the commit that deletes these answers, which no fault here undoes."""
        try:
            remove_letters(self._dead_letters, lambda ids: ids & set(answer_ids))
        except OSError:  # the sweep comes back to it
            logger.exception("Dead letters not removed", extra={"action": "remains_left"})
        try:
            self.clear_log()
        except Exception:  # it is due still
            logger.exception("Log not emptied", extra={"action": "remains_left"})

    def clear_log(self) -> None:
        """Empty the log now, or as soon as nobody is in the way."""
        self._log_is_due = True
        self._log_is_due = not self._database.truncate_log()

    def sweep(self) -> None:
        """Remove what has expired, and letters of answers that were deleted elsewhere."""
        removed = MOST_REMOVED
        while removed == MOST_REMOVED:
            with self._database.write() as session:
                removed = remove_old(session)
        remove_letters(self._dead_letters, self._find_gone)
        self.clear_log()

    async def follow(self) -> None:
        """Until it is cancelled."""
        swept_at: float | None = None
        while True:
            try:
                if swept_at is None or time.monotonic() - swept_at > SWEEP_SECONDS:
                    swept_at = time.monotonic()
                    await asyncio.to_thread(self.sweep)
                elif self._log_is_due:
                    await asyncio.to_thread(self.clear_log)
            except Exception:
                logger.exception("Remains not cleared up", extra={"action": "remains_left"})
            await asyncio.sleep(RETRY_SECONDS)

    def _find_gone(self, ids: set[str]) -> set[str]:
        there: set[str] = set()
        names = sorted(ids)
        with self._database.read() as session:
            for start in range(0, len(names), MOST_REMOVED):
                page = names[start : start + MOST_REMOVED]
                there.update(session.scalars(select(Answer.id).where(Answer.id.in_(page))))
        return ids - there
