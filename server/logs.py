"""Log lines: one JSON object each, on standard error.

Owns the format. Every line has an `action` that says what happened in one word; the rest of `extra`
stands beside it, and the id of the request that it was written for. Does not own: what is logged.
Prompt text and keys never are.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from server.http.request_ids import describe_request

SELDOM_SECONDS = 1.0

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """`{"at", "level", "logger", "action", "message", …}`."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= describe_request()
        said |= {key: value for key, value in vars(record).items() if key not in _PLAIN}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str, ensure_ascii=False)


class Seldom(logging.Filter):
    """Of lines with a stack trace, one a second for each logger, action and type of error.

    While a database is away every request has one, and they would fill the disk. The next line that
    passes says how many were `held_back`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._passed: dict[tuple[Any, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if not record.exc_info:
            return True
        what = record.name, getattr(record, "action", None), record.exc_info[0]
        now = self._clock()
        at, held_back = self._passed.get(what, (-SELDOM_SECONDS, 0))
        if now - at < SELDOM_SECONDS:
            self._passed[what] = at, held_back + 1
            return False
        self._passed[what] = now, 0
        if held_back:
            record.held_back = held_back
        return True


def configure_logging(level: str) -> None:
    """Send everything from `level` (debug, info, warning, error) on to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Seldom())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "alembic", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
