"""`DATA/run/engine.json`: what the supervisor says about its engine, and where gateways find it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from server.engines.base import EngineAddress


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What `DATA/run/engine.json` says about the engine that runs."""

    url: str
    api_key: str
    pid: int
    boot_id: str  #: random, new with every start
    started_at: float  #: seconds since the epoch, UTC
    base_name: str
    model_path: str
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    log: str


def read_engine_record(run_dir: Path) -> EngineRecord | None:
    """The managed engine's record, or None; it may be of an engine that has died since."""
    try:
        return EngineRecord(**json.loads((run_dir / "engine.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def managed_address(run_dir: Path) -> EngineAddress | None:
    """Where the supervisor's engine listens; None while there is none."""
    try:
        found = json.loads((run_dir / "engine.json").read_text(encoding="utf-8"))
        return EngineAddress(id="engine-0", url=found["url"], api_key=found["api_key"])
    except (OSError, ValueError, KeyError):
        return None
