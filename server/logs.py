"""Log lines: one JSON object each, on standard error.

Owns the format. Every line has an `action` that says what happened in one word; the rest of `extra`
stands beside it, and the id of the request that it was written for. Does not own: what is logged.
Prompt text and keys never are.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from server.request_ids import describe_request

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


def configure_logging(level: str) -> None:
    """Send everything from `level` (debug, info, warning, error) on to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "alembic", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
