"""What is read of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.machine import GIB, cpu_quota, read_machine


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000\n", None), ("200000 100000\n", 2), ("150000 100000\n", 2), ("odd\n", None)],
)
def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, content: str, cores: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_quota(tmp_path / "cpu.max") == cores
    assert cpu_quota(tmp_path / "missing") is None


def test_this_machine_has_cores_and_memory() -> None:
    machine = read_machine()
    assert machine.architecture == os.uname().machine
    assert set(machine.cpus) <= os.sched_getaffinity(0)
    assert machine.cpus
    assert machine.memory_bytes > GIB / 4
    assert machine.cpu_flags
