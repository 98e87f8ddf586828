"""What this machine is, as far as defaults and the doctor depend on it, and this interpreter.

Owns: reading cores, instruction sets, memory and GPUs without importing torch or vLLM; how often
garbage is collected; how many files may be open. Does not own: what follows from the machine
(`processes/engine.py`, `setup/doctor.py`).
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that engine defaults are chosen by."""

    architecture: str  #: `x86_64` or `aarch64`
    #: ids of the logical cores that this process may use; no more than its container has time for
    cpus: tuple[int, ...]
    cpu_flags: frozenset[str]
    memory_bytes: int  #: of the machine, or of the container where that is less
    device: Literal["cpu", "cuda"]


def read_machine() -> Machine:
    """Look at the machine that this process runs on."""
    return Machine(
        architecture=platform.machine(),
        cpus=tuple(sorted(os.sched_getaffinity(0)))[: cpu_quota()],
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        memory_bytes=min(_physical_memory(), _container_memory()),
        device="cuda" if installed_version("vllm") and list_gpus() else "cpu",
    )


def allow_open_files(wanted: int) -> int:
    """Let this process hold so many open files where it may; how many it may hold now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limited = [limit for limit in (wanted, hard) if limit != resource.RLIM_INFINITY]
    if soft != resource.RLIM_INFINITY and soft < min(limited):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limited), hard))
        soft = min(limited)
    return wanted if soft == resource.RLIM_INFINITY else soft


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_gpus() -> list[str]:
    """One line per NVIDIA GPU, `name, memory`, as `nvidia-smi` tells it; empty without any."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0
        else []
    )


def cpu_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Cores' worth of time that the control group (v2) allows, rounded up; None: no limit.

    A container with two of 64 cores' time still sees 64: threads beyond the quota only wait.
    """
    try:
        quota, period = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return math.ceil(int(quota) / int(period)) if quota.isdecimal() else None


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, arm64
            return frozenset(value.split())
    return frozenset()


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory() -> int:
    """Limit of this process's control group (v2); what the machine has where there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return _physical_memory()
    return int(limit) if limit.isdecimal() else _physical_memory()


def collect_garbage_rarely() -> None:
    """Leave what was imported out of every collection, and collect after many allocations only.

    With 64 requests at once a tenth of this process' time went into collections that found next to
    nothing: a request's objects end with it, by their counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
