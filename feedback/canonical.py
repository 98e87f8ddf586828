"""The one JSON text of a value: what is hashed and compared, whatever order its keys came in.

It imports nothing heavy: the child that reads uploads starts in milliseconds because of that.
"""

from __future__ import annotations

import json
from typing import Any

_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces; NaN and infinities raise ValueError."""
    return _CANONICAL.encode(value)
