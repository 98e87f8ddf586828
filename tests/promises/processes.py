"""A gateway and an engine as processes of their own, which can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file

from feedback.db import Database
from server.access.keys import create_key
from server.processes.engine import free_port
from server.settings import ModelSettings, Settings
from server.setup.upgrade import upgrade
from tests.gateway_fixtures import CHAT_TEMPLATE
from tuner.base_models import BaseModel, describe_base

START_SECONDS = 60.0
PASS_THROUGH = Path(__file__).resolve().parents[2] / "benchmarks/peers/passthrough.py"


@contextmanager
def engine_process(*options: str) -> Iterator[str]:
    """A fake engine in a process; its address."""
    with _serving("-m", "tests.fake_engine", *options) as url:
        yield url


@contextmanager
def pass_through_process(engine: str) -> Iterator[str]:
    """The benchmarks' pass-through before an engine: a gateway that checks and records nothing."""
    with _serving(str(PASS_THROUGH), "--engine", engine) as url:
        yield url


@contextmanager
def _serving(*arguments: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-P", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until(f"{url}/health", process)
        yield url
    finally:
        process.kill()
        process.wait()


@contextmanager
def gateway_process(
    data: Path, model: Path, engine: str, log: Path, **variables: str
) -> Iterator[GatewayProcess]:
    """`burnish gateway` over an engine that runs; killed at the end where it still lives.

    `variables` of the environment are further settings.
    """
    port = free_port()
    environment = {
        **os.environ,
        "BURNISH_DATA": str(data),
        "BURNISH_PORT": str(port),
        "BURNISH_MODEL__PATH": str(model),
        "BURNISH_ENGINE__URLS": json.dumps([engine]),
        "BURNISH_GATEWAY__REFRESH_SECONDS": "0.1",
        **variables,
    }
    command = [sys.executable, "-P", "-m", "server.cli", "gateway"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stderr=output, stdout=output, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until(f"{url}/readyz", process)
        yield GatewayProcess(url, process)
    finally:
        process.kill()
        process.wait()


@contextmanager
def worker_process(settings: Settings, url: str, log: Path, **variables: str) -> Iterator[None]:
    """`burnish worker` beside a gateway at `url`, ended at the end."""
    environment = {
        **os.environ,
        "BURNISH_DATA": str(settings.data),
        "BURNISH_MODEL__PATH": settings.model.path,
        "BURNISH_WORKER__GATEWAY_URL": url,
        "BURNISH_WORKER__POLL_SECONDS": "0.1",
        "BURNISH_WORKER__TRAINING_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-P", "-m", "server.cli", "worker"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stderr=output, stdout=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


class GatewayProcess:
    """A gateway that answers at `url`."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self._process = process

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)


@dataclass(frozen=True)
class Prepared:
    """What a gateway needs before it starts."""

    base: BaseModel
    settings: Settings
    database: Database

    def key(self, user: str = "anna", scope: str = "chat") -> str:
        with self.database.write() as session:
            return create_key(session, user=user, scopes=[scope])[1]


def prepare(folder: Path, settings: Settings | None = None) -> Prepared:
    """A model in `folder`, and a database with a deployment of it; by default SQLite there too."""
    base = build_model(folder / "tiny")
    if settings is None:
        settings = Settings(data=folder / "data", model=ModelSettings(path=str(base.path)))
    settings.data.mkdir()
    database = Database(settings.database_url)
    upgrade(settings, database, base, url="http://127.0.0.1")
    return Prepared(base, settings, database)


def build_model(folder: Path) -> BaseModel:
    """A directory that a gateway takes for a chat model; nothing in it is ever run."""
    folder.mkdir()
    config: dict[str, Any] = {
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "vocab_size": 320,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return describe_base(folder, folder.name)


def _wait_until(url: str, process: subprocess.Popen[bytes]) -> None:
    """Ask until `url` answers 200: another process has no event to wait for."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        # What is waited for happens in another process, which has no event to wait on.
        time.sleep(0.02)
    raise RuntimeError(f"{url} does not answer (exit {process.poll()})")
