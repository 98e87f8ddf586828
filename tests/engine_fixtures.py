"""Engines for tests: the fake one in a thread, and a real vLLM with a random model in a process.

The real one starts once per run, in about 25 seconds; tests that use it carry the marker `engine`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.engines.base import EngineAddress
from server.processes.children import Launch, start_guarded
from server.processes.engine import answers_ok, free_port
from tests.fake_engine import FakeEngine
from tests.tiny_adapters import TARGET_MODULES, build_tiny_adapter
from tests.tiny_model import DEFAULT_SYSTEM, build_tiny_model

START_SECONDS = 180.0
ADAPTERS = 4

#: The parts of the tiny model's configuration that its adapters' shapes follow from.
TINY_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}

_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # The worker lives in the engine core's process: one interpreter less to start, 10 of 36
    # seconds.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random chat model."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four random adapters for the tiny model; made without torch."""
    root = tmp_path_factory.mktemp("adapters")
    (root / "config.json").write_text(json.dumps(TINY_SHAPE))
    return [build_tiny_adapter(root, root / str(seed), seed=seed) for seed in range(ADAPTERS)]


@pytest.fixture
def fake_engine() -> Iterator[FakeEngine]:
    """A fake engine with vLLM's smallest slots: one adapter runs at a time, two are in memory."""
    with FakeEngine(
        model="tiny",
        api_key="secret",
        max_loras=1,
        max_cpu_loras=2,
        max_model_len=512,
        default_system=DEFAULT_SYSTEM,
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def real_engine(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineAddress]:
    """A real vLLM with the same slots, serving the tiny model as `tiny`."""
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with start_vllm(tiny_model, log, max_loras=1, max_cpu_loras=2) as address:
        yield address


@contextmanager
def start_vllm(
    model: Path,
    log: Path,
    *,
    name: str = "tiny",
    max_loras: int,
    max_cpu_loras: int,
    max_model_len: int = 512,
    environment: Mapping[str, str] = _ENVIRONMENT,
) -> Iterator[EngineAddress]:
    """A vLLM server on a free port with a random key, until the context ends.

    Raises `RuntimeError` with the end of its log when it dies or isn't healthy in `START_SECONDS`.
    """
    port = free_port()
    address = EngineAddress("vllm", f"http://127.0.0.1:{port}", secrets.token_hex(8))
    options: dict[str, Any] = {
        "model": model,
        "served-model-name": name,
        "host": "127.0.0.1",
        "port": port,
        "api-key": address.api_key,
        "max-loras": max_loras,
        "max-cpu-loras": max_cpu_loras,
        "max-lora-rank": 16,
        "dtype": "float32",
        "max-model-len": max_model_len,
        "max-num-seqs": 16,
    }
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += [f"--{option}={value}" for option, value in options.items()]
    # Without a list of modules vLLM wraps the output layer too, and on a CPU `prompt_logprobs`
    # beside a running request then kills the engine.
    command += ["--enable-lora", "--enforce-eager", "--lora-target-modules", *TARGET_MODULES]
    # A random model never ends the blanks that JSON allows between its parts.
    outputs = {"backend": "xgrammar", "disable_any_whitespace": True}
    command += ["--structured-outputs-config", json.dumps(outputs)]
    command += ["--trust-request-chat-template"]  # for the grid of templates, and nothing else
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    # Guarded, as the supervisor starts it: nothing is left even when the test run is killed.
    with log.open("wb") as output:
        guard, link = start_guarded(Launch(command, {**os.environ, **environment}), output=output)
    with link:
        try:
            _wait_until_healthy(guard, address.url, log)
            yield address
        finally:
            link.close()
            guard.wait()


def _wait_until_healthy(guard: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and guard.poll() is None:
        if answers_ok(f"{url}/health", timeout_seconds=5):
            return
        # vLLM is another process and tells nobody when it is up: its port is asked.
        time.sleep(0.2)
    raise RuntimeError(f"vLLM didn't start (exit {guard.poll()}):\n{log.read_text()[-4000:]}")
