"""What a worker is told when it starts, and what the handlers of jobs work with."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from feedback import audit
from feedback.db import Database
from tuner.adapters import AdapterStore
from tuner.evaluation.gateway_client import GatewayClient

TRAINER = (sys.executable, "-P", "-m", "tuner.training")


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker needs to know; times in seconds."""

    database_url: str
    data: Path  #: the directory that holds everything; files' paths are below it
    model_dir: Path
    base_name: str
    gateway_url: str
    api_key: str  #: the internal key
    model_revision: str | None = None
    max_lora_rank: int = 16
    max_model_len: int | None = None  #: tokens that the engine reads at most; None: the base's own
    training_threads: int | None = None  #: None: all cores
    lease_seconds: float = 30.0
    poll_seconds: float = 1.0
    max_attempts: int = 3
    seal: audit.Seal | None = None  #: what entries of the audit log are signed with
    trainer: Sequence[str] = TRAINER  #: command of the child; the configuration's path is appended


@dataclass(frozen=True, slots=True)
class Workbench:
    """What the handlers of jobs have at hand; both lanes share it."""

    database: Database
    options: WorkerOptions
    client: GatewayClient
    store: AdapterStore
    monotonic: Callable[[], float] = time.monotonic
