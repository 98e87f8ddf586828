"""The environment for other people's programs (vLLM, torch), without our credentials."""

from __future__ import annotations

import os

_OUR_VARIABLES = "BURNISH_"
_DATABASE_VARIABLES = frozenset({"PGPASSWORD", "PGPASSFILE"})  #: libpq reads them


def environment_for_others() -> dict[str, str]:
    """This process's own environment without what opens the gateway or the database."""
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(_OUR_VARIABLES) and key not in _DATABASE_VARIABLES
    }
