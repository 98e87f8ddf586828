"""The benchmarks' load, in a process of its own, on a gateway or an engine that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOAD = Path(__file__).resolve().parents[2] / "benchmarks/peers/load.py"


def ask_at_rate(
    url: str, model: str, key: str, *, requests: int, rate: float = 50.0, stream: bool = False
) -> dict[str, Any]:
    """So many requests in an open loop: `ends`, `failures`, `p50_ms`, `p95_ms`, `p99_ms`."""
    command = [sys.executable, "-P", str(LOAD), "--url", url, "--model", model, "--key", key]
    command += ["--requests", str(requests), "--rate", str(rate), "--clients", "4"]
    command += ["--seconds", str(requests / rate)] + (["--stream"] if stream else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def resident_mib(pid: int) -> float:
    """Memory of a process in RAM (proc_pid_status(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no memory")
