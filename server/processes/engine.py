"""The managed engine: one vLLM server as a child of the supervisor.

Owns: its arguments and environment (with defaults for small CPU machines, measured in
`docs/engine-defaults.md`), its address and key, and that its record says them. Does not own: the
record (`engine_record.py`), how children are kept alive (`supervisor.py`) or what is asked of an
engine (`engines/vllm.py`).
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from server.engines import cpu_lora
from server.engines.tool_parsers import tool_options
from server.machine import GIB, Machine, read_machine
from server.processes.children import Launch, write_private_json
from server.processes.engine_record import EngineRecord
from server.settings import BUNDLED_MODEL, Settings
from tuner.base_models import BaseModel, describe_base, read_chat_template
from tuner.environment import environment_for_others

CPU_CONTEXT_TOKENS = 4096  #: default context on a CPU, where a longer prompt takes minutes
#: Default of requests that run together on a CPU; more only share the same tokens/s.
CPU_SEQUENCES = 16


class EngineSettingsError(ValueError):
    """`[engine]` asks for something that can't be; the message names the key."""


def engine_command(
    settings: Settings,
    machine: Machine,
    base: BaseModel,
    *,
    port: int,
    api_key: str,
    template: str = "",
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of vLLM for these settings on this machine; pure.

    `template` is the base's chat template, which the parser of tool calls follows from. The
    environment holds only what differs from the supervisor's own. The key goes there, where
    other users of the machine can't read it. Raises `EngineSettingsError`.
    """
    options: dict[str, Any] = {
        "model": str(base.path.resolve()),
        "served-model-name": base.name,
        "host": "127.0.0.1",
        "port": port,
        "enable-lora": True,
        "max-loras": settings.engine.max_loras,
        "max-cpu-loras": settings.engine.max_cpu_loras or settings.engine.max_loras,
        "max-lora-rank": settings.engine.max_lora_rank,
        "dtype": settings.engine.dtype or _default_dtype(machine),
    }
    environment = {
        "VLLM_API_KEY": api_key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if base.linear_modules:
        # Without a list vLLM wraps the output layer too, which Burnish never tunes; on a CPU
        # `prompt_logprobs` beside a running request then kills the engine.
        options["lora-target-modules"] = sorted(
            {module.rpartition(".")[2] for module in base.linear_modules}
        )
    if settings.model.path == BUNDLED_MODEL:
        environment["HF_HUB_OFFLINE"] = "1"
    if (settings.engine.max_model_len or 0) > base.max_position_embeddings:
        raise EngineSettingsError(
            f"engine.max_model_len is {settings.engine.max_model_len}, but {base.name!r} reads at "
            f"most {base.max_position_embeddings} tokens (max_position_embeddings in config.json)"
        )
    if settings.engine.max_model_len is not None:
        options["max-model-len"] = settings.engine.max_model_len
    if machine.device == "cpu":
        options.setdefault("max-model-len", min(CPU_CONTEXT_TOKENS, base.max_position_embeddings))
        options["max-num-seqs"] = CPU_SEQUENCES
        environment |= _cpu_environment(settings, machine)
    verbatim = _verbatim(settings.engine.args)
    try:
        options |= tool_options(settings.engine.tool_parser, verbatim, template, base.architecture)
    except ValueError as error:
        raise EngineSettingsError(str(error)) from None
    options |= verbatim
    return [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.openai.api_server",
        *_arguments(options),
    ], environment


def _default_dtype(machine: Machine) -> str:
    # On a CPU bfloat16 gains little with LoRA, and its rounding hides small effects from proofs.
    return "float32" if machine.device == "cpu" else "auto"


def _cpu_environment(settings: Settings, machine: Machine) -> dict[str, str]:
    threads = min(settings.engine.threads or len(machine.cpus), len(machine.cpus))
    kv_cache_gib = settings.engine.kv_cache_gib or max(
        1, min(8, machine.memory_bytes // (12 * GIB))
    )
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(cpu) for cpu in machine.cpus[:threads]),
    }


def _verbatim(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lstrip("-").replace("_", "-"): value for key, value in arguments.items()}


def _arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as arguments: `{"a": 1, "b": True, "c": False}` becomes `--a 1 --b --no-c`.

    A list gives its items after the flag: `{"d": [1, 2]}` becomes `--d 1 2`.
    """
    arguments: list[str] = []
    for key, value in options.items():
        match value:
            case None:
                continue
            case True:
                arguments.append(f"--{key}")
            case False:
                arguments.append(f"--no-{key}")
            case list():
                arguments += [f"--{key}", *map(str, value)]
            case dict():
                arguments += [f"--{key}", json.dumps(value)]
            case _:
                arguments += [f"--{key}", str(value)]
    return arguments


def _with_our_plugin(chosen: str | None) -> dict[str, str]:
    """What makes vLLM load `cpu_lora.py`, whatever `VLLM_PLUGINS` has chosen."""
    if not cpu_lora.is_installed():
        raise EngineSettingsError(
            "vLLM would answer for the base with an adapter's weights: its plugin "
            f"{cpu_lora.NAME!r} is not installed; install Burnish again (`make env`, "
            "or `pip install` of its directory)"
        )
    if chosen is None:  # then it loads all
        return {}
    return {"VLLM_PLUGINS": ",".join([*filter(None, chosen.split(",")), cpu_lora.NAME])}


class EngineProcess:
    """Starts of the managed engine, each with a port, a key and a boot id of its own."""

    def __init__(self, settings: Settings, machine: Machine | None = None) -> None:
        self._settings = settings
        self._machine = machine or read_machine()
        self._record: EngineRecord | None = None
        self.log = settings.log_dir / "engine.log"

    def prepare(self) -> Launch:
        """The next start's command; called before every start. Raises `EngineSettingsError`."""
        settings = self._settings
        base = describe_base(
            settings.model_dir,
            settings.base_name,
            settings.model.revision,
            cache=settings.data / "models" / "revisions.json",
        )
        port, api_key = settings.engine.port or free_port(), secrets.token_urlsafe(32)
        argv, environment = engine_command(
            settings,
            self._machine,
            base,
            port=port,
            api_key=api_key,
            template=read_chat_template(base.path),
        )
        if self._machine.device == "cpu":
            environment |= _with_our_plugin(os.environ.get("VLLM_PLUGINS"))
        self._record = EngineRecord(
            url=f"http://127.0.0.1:{port}",
            api_key=api_key,
            pid=0,
            boot_id=secrets.token_hex(16),
            started_at=time.time(),
            base_name=base.name,
            model_path=str(base.path.resolve()),
            max_loras=settings.engine.max_loras,
            max_cpu_loras=settings.engine.max_cpu_loras or settings.engine.max_loras,
            max_lora_rank=settings.engine.max_lora_rank,
            log=str(self.log.resolve()),
        )
        return Launch(argv, environment_for_others() | environment)

    def started(self, pid: int) -> None:
        """Tell the gateways: write `DATA/run/engine.json`."""
        if self._record is not None:
            content = {**asdict(self._record), "pid": pid}
            self._record = EngineRecord(**content)
            write_private_json(self._settings.run_dir / "engine.json", content)

    def is_ready(self) -> bool:
        """Whether the server answers its health check."""
        return self._record is not None and answers_ok(f"{self._record.url}/health")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers_ok(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether a GET of `url` is answered with 200; proxies of the environment are passed by."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_seconds) as reply:
            return bool(reply.status == 200)
    except (OSError, http.client.HTTPException):
        return False
