"""JSON texts of a value: to be hashed and compared, or with the order of its keys.

Of the first kind two equal values have the same text. The second is what chat templates write into
prompts.

It imports nothing heavy: the child that reads uploads starts in milliseconds because of that.
"""

from __future__ import annotations

import json
from typing import Any

_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_IN_ORDER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_in_order(value: Any) -> str:
    """Write `value` as JSON with its keys as they stand and no spaces.

    NaN and infinities raise ValueError.
    """
    return _IN_ORDER.encode(value)


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces; NaN and infinities raise ValueError."""
    return _CANONICAL.encode(value)
