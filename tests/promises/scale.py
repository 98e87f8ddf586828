"""How often a promise is put to the test: a small number by default, the full one on request."""

from __future__ import annotations

import os


def is_full() -> bool:
    """Whether promises are tested with their full number of repetitions."""
    return os.environ.get("BURNISH_PROMISES") == "full"


def scaled(full: int) -> int:
    """`full` with BURNISH_PROMISES=full, else a twentieth of it, at least one."""
    return full if is_full() else max(1, full // 20)
