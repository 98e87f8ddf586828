"""The data directory: made for this user alone, or refused in one sentence; and what caches there.

Owns: the folders that must be there before anything starts, and where the engine's and the
trainer's libraries keep their caches. Does not own: what lies in the folders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from server.settings import Settings


class DataUnfit(SystemExit):
    """Nothing can be kept in the data directory; the message says why and what to do."""


def prepare_data(settings: Settings) -> None:
    """Make `data` and what must lie in it before anything starts. Raises `DataUnfit`."""
    for folder in (settings.data, settings.run_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DataUnfit(_fault(settings.data, explain(folder, error))) from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DataUnfit(_fault(settings.data, f"{str(folder)!r} can't be written by this user"))


def explain(folder: Path, error: OSError) -> str:
    """Why a folder can't be made."""
    return find_obstacle(folder) or error.strerror or str(error)


def find_obstacle(folder: Path) -> str | None:
    """The part of a folder's path because of which nothing can be written there, or None."""
    there = find_existing(folder)
    if not there.is_dir():
        return f"{str(there)!r} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{str(there)!r} can't be written by this user"
    return None


def find_existing(folder: Path) -> Path:
    """The longest part of a folder's path that is there."""
    return next(part for part in (folder, *folder.absolute().parents) if part.exists())


def _fault(data: Path, why: str) -> str:
    return (
        f"burnish: the data directory {str(data)!r} can't be used: {why}; "
        "give another one as DATA (the setting `data`), or mend its owner and mode"
    )


def cache_variables(data: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep the caches of vLLM, torch and Triton below `data`, where not set already.

    Where the user has no home directory to write to, as in a container under a foreign user id,
    `HOME` is there too.
    """
    cache = data.resolve() / "cache"
    variables = {
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    home = environment.get("HOME") or os.path.expanduser("~")
    if home == "/" or not os.access(home, os.W_OK | os.X_OK):
        variables["HOME"] = str(cache)
    return {
        name: value
        for name, value in variables.items()
        if name == "HOME" or not environment.get(name)
    }
