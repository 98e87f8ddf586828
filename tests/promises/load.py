"""The benchmarks' load, in a process of its own, on a gateway or an engine that runs."""

from __future__ import annotations

import json
import os
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"the load ended with {done.returncode}: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def resident_mib(pid: int) -> float:
    """Memory of a process in RAM (proc_pid_status(5))."""
    return _status_mib(pid, "VmRSS")


def peak_mib(pid: int) -> float:
    """The most that a process has held in RAM since `reset_peak`."""
    return _status_mib(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Forget what a process held in RAM at most (proc(5), `clear_refs`)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """What a process has worked, on all cores; its children have limits of their own."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def _status_mib(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"process {pid} has no memory")
