"""Which engine settings are fastest on this machine.

`python -P benchmarks/engine_defaults.py DIRECTORY [VARIANT…]`

Starts vLLM once per variant, as the supervisor would, and prints a Markdown table: seconds to
start, tokens/s for one stream and for sixteen together, without and with a LoRA adapter of rank 16,
processor time per token of sixteen streams, and the machine's load. Up to four variants, of which
the defaults are always one, run beside each other and are asked in turn, so compare the rows of one
group; on a machine that does other things too, processor time says more than tokens/s. Medians of
`--rounds`. The results that the defaults rest on are in `docs/engine-defaults.md`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import secrets
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from server.machine import Machine, read_machine
from server.processes.children import Launch, start_guarded
from server.processes.engine import answers_ok, engine_command, free_port
from server.settings import EngineSettings, ModelSettings, Settings
from tuner.base_models import BaseModel, describe_base

TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4",
)
LORA = "lora"
WORKLOADS = {1: 16, 16: 8}  #: streams together, and the tokens of each
TOGETHER = 4  #: engines that run beside each other; 2 GiB each with a small model
GLIBC_KEEPS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults; an environment value of None takes the variable away."""

    environment: dict[str, str | None] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def variants(machine: Machine) -> dict[str, Variant]:
    """The candidates, by name."""
    every = ",".join(map(str, machine.cpus))
    tcmalloc = next((path for path in TCMALLOC if Path(path).exists()), "")
    return {
        "defaults": Variant(),
        "bind-auto": Variant({"VLLM_CPU_OMP_THREADS_BIND": "auto"}),
        "bind-all": Variant({"VLLM_CPU_OMP_THREADS_BIND": every}),
        "nobind": Variant(
            {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(machine.cpus))}
        ),
        "nobind-passive": Variant(
            {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(len(machine.cpus)),
                "OMP_WAIT_POLICY": "passive",
            }
        ),
        "glibc": Variant(dict(GLIBC_KEEPS)),
        "tcmalloc": Variant({"LD_PRELOAD": tcmalloc}),
        "float32": Variant(arguments={"dtype": "float32"}),
        "bfloat16": Variant(arguments={"dtype": "bfloat16"}),
        "eager": Variant(arguments={"enforce-eager": True}),
        "one-process": Variant(
            {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(len(machine.cpus)),
            }
        ),
        "vllm-lora": Variant({"VLLM_PLUGINS": ""}),
        "one-lora": Variant(arguments={"max-loras": 1}),
    }


def write_adapter(folder: Path, base: BaseModel, rank: int = 16) -> Path:
    """The folder with a LoRA adapter of small random weights on every linear layer."""
    generator = np.random.default_rng(0)
    tensors = {}
    for module, (outputs, inputs) in base.linear_modules.items():
        for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            weights = generator.normal(scale=0.01, size=shape).astype(np.float32)
            tensors[f"base_model.model.{module}.{part}.weight"] = weights
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in base.linear_modules})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Server:
    url: str
    key: str
    session: int  #: of all its processes
    start_seconds: float = 0.0

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            content = reply.read()
            return json.loads(content) if content.startswith(b"{") else content

    def answer(self, model: str, number: int, tokens: int) -> int:
        """Generate exactly `tokens` tokens; returns how many."""
        prompt = {
            "role": "user",
            "content": f"Tell me about the number {number} in a few sentences.",
        }
        body = {
            "model": model,
            "messages": [prompt],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        return int(self.post("/v1/chat/completions", body)["usage"]["completion_tokens"])

    def rate(self, model: str, streams: int, tokens: int) -> tuple[float, float]:
        """Tokens/s of `streams` requests together, prompts read included; CPU ms per token."""
        before, began = self._cpu_seconds(), time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            done = sum(pool.map(lambda number: self.answer(model, number, tokens), range(streams)))
        seconds = time.perf_counter() - began
        return done / seconds, (self._cpu_seconds() - before) / done * 1000

    def _cpu_seconds(self) -> float:
        """User and system time that the engine's processes have used (proc_pid_stat(5))."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.session:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(
    name: str, variant: Variant, machine: Machine, base: BaseModel, adapter: Path
) -> Iterator[Server]:
    """The engine with this variant's settings, warm."""
    port, key = free_port(), secrets.token_hex(8)
    engine = EngineSettings(args=variant.arguments, kv_cache_gib=1)
    settings = Settings(model=ModelSettings(path=str(base.path)), engine=engine)
    argv, extra = engine_command(settings, machine, base, port=port, api_key=key)
    environment: dict[str, str | None] = {
        **os.environ,
        **extra,
        "HF_HUB_OFFLINE": "1",
        **variant.environment,
    }
    launch = Launch(argv, {k: v for k, v in environment.items() if v is not None})
    with tempfile.NamedTemporaryFile(prefix=f"engine-{name}-", suffix=".log", delete=False) as log:
        began = time.perf_counter()
        guard, link = start_guarded(launch, output=log)
    server = Server(f"http://127.0.0.1:{port}", key, guard.pid)
    with link:
        try:
            while not answers_ok(f"{server.url}/health"):
                if guard.poll() is not None:
                    raise SystemExit(f"{name}: the engine ended; see {log.name}")
                # Another process starts: there is nothing to wait on but its port.
                time.sleep(0.1)
            server.start_seconds = time.perf_counter() - began
            body = {"lora_name": LORA, "lora_path": str(adapter)}
            server.post("/v1/load_lora_adapter", body)
            for model in (base.name, LORA):
                server.rate(model, 2, 4)
            yield server
        finally:
            link.close()
            guard.wait()
    Path(log.name).unlink()


def compare(
    chosen: Mapping[str, Variant], machine: Machine, base: BaseModel, adapter: Path, rounds: int
) -> Iterator[tuple[str, list[float]]]:
    """For each variant the cells of its row, medians over `rounds`.

    The variants run beside each other and are asked in turn, so that whatever else the machine does
    slows them all alike.
    """
    measured: dict[tuple[str, str, int], list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(running(name, variant, machine, base, adapter))
            for name, variant in chosen.items()
        }
        for _ in range(rounds):
            for streams, tokens in WORKLOADS.items():
                for model in (base.name, LORA):
                    for name, server in engines.items():
                        rate = server.rate(model, streams, tokens)
                        measured[name, model, streams].append(rate)
    for name, server in engines.items():
        columns = {
            (model, streams): [
                statistics.median(column)
                for column in zip(*measured[name, model, streams], strict=True)
            ]
            for model in (base.name, LORA)
            for streams in WORKLOADS
        }
        cells = [server.start_seconds]
        cells += [rate for rate, _ in columns.values()]
        cells += [cpu for (_, streams), (_, cpu) in columns.items() if streams > 1]
        yield name, cells


def main() -> None:
    machine = read_machine()
    known = variants(machine)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory of the base model")
    parser.add_argument("variants", nargs="*", choices=[*known, []], help="default: all of them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base = describe_base(options.model, "base")
    names = [name for name in options.variants or known if name != "defaults"]
    print(
        f"{machine.architecture}, {len(machine.cpus)} cores, "
        f"{machine.memory_bytes / 2**30:.0f} GiB, {machine.device}\n\n"
        "| variant | start s | 1 stream | 16 streams | 1 stream, LoRA | 16 streams, LoRA "
        "| CPU ms/token | CPU ms/token, LoRA | load |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(Path(folder) / "adapter", base)
        for at in range(0, max(1, len(names)), TOGETHER - 1):
            group = ["defaults", *names[at : at + TOGETHER - 1]]
            chosen = {name: known[name] for name in group}
            for name, row in compare(chosen, machine, base, adapter, options.rounds):
                cells = " | ".join(f"{figure:.1f}" for figure in row)
                print(f"| {name} | {cells} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
