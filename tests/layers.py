"""Runs the layers of the tests, all of them: `python3 tests/layers.py [--lint] [LAYER …]`.

Says first what this machine lacks and what can't be tested without it, installs that where it may
(as root, with apt-get), makes the environment, runs every layer even where an earlier one failed,
and ends with a table and one line of what passed, failed and was skipped. Like `bootstrap.py` it
runs under whatever Python 3 there is: standard library only, no syntax newer than 3.8.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PYTHON = str(ROOT / ".venv" / "bin" / "python")
CLIENTS_GIB = 5  #: what the clients' environments take

LAYERS = {
    "fast": [
        *("-n", "4", "--ignore=tests/tuner/training"),
        # Importing these takes seconds of each process.
        *("--ignore=tests/promises", "--ignore=tests/loop"),
        "--ignore=tests/server/engines/test_cpu_lora.py",
        *("-m", "not engine and not loop and not promises and not clients and not processes"),
    ],
    "processes": [
        *("-n", "4", "-m", "processes", "--ignore=tests/tuner/training"),
        *("--ignore=tests/promises", "--ignore=tests/loop"),
    ],
    "training": [
        *("-n", "2", "-m", "not promises and not engine", "tests/tuner/training"),
        "tests/server/engines/test_cpu_lora.py",
    ],
    "promises": ["-n", "2", "-m", "promises and not engine"],
    "clients": ["-m", "clients"],
    "engine": ["-m", "engine"],
    "loop": ["-m", "loop"],
}
"""What pytest is asked for, by layer, in the order of what they take."""

LINT = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"])


class Outcome(NamedTuple):
    """How a layer ended."""

    layer: str
    passed: int
    failed: int
    skipped: int
    seconds: float


class Need(NamedTuple):
    """Something of the machine that some tests can't do without."""

    name: str
    without: str  #: what happens without it
    layers: Sequence[str]
    is_there: Callable[[], bool]
    package: str = ""  #: Debian's, which brings it


def has_command(name: str) -> bool:
    """Whether a command is on the PATH."""
    return shutil.which(name) is not None


def has_numa() -> bool:
    """Whether vLLM's build for CPUs can be loaded; a machine with a GPU takes the other one."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return has_command("nvidia-smi")
    return True


def may_mount() -> bool:
    """Whether a file system can be mounted here: tried with a small one."""
    if not has_command("mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode != 0:
            return False
        subprocess.run(["umount", "--lazy", folder], check=True)
    return True


def has_room() -> bool:
    """Whether the clients' environments are there, or fit on the disk."""
    free = shutil.disk_usage(str(ROOT)).free
    return (ROOT / ".clients").exists() or free > CLIENTS_GIB * 2**30


NEEDS = (
    Need(
        "libnuma.so.1",
        "no environment can be made: vLLM's build for CPUs links it",
        list(LAYERS),
        has_numa,
        "libnuma1",
    ),
    Need(
        "chromium",
        "the pages are not tested in a browser",
        ["processes"],
        lambda: has_command("chromium"),
        "chromium",
    ),
    Need(
        "openssl",
        "engines behind TLS are not tested",
        ["fast"],
        lambda: has_command("openssl"),
        "openssl",
    ),
    Need(
        "the right to mount (root)",
        "a full disk is not tested (promise 31)",
        ["promises"],
        may_mount,
    ),
    Need(
        f"{CLIENTS_GIB} GiB of disk", "other people's clients are not tested", ["clients"], has_room
    ),
)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def find_missing(needs: Sequence[Need], layers: Sequence[str]) -> list[Need]:
    """Those that one of the layers needs and that are not there."""
    return [need for need in needs if set(need.layers) & set(layers) and not need.is_there()]


def prepare(layers: Sequence[str]) -> None:
    """Install what is missing where that is allowed, and say what stays missing."""
    missing = find_missing(NEEDS, layers)
    packages = sorted(need.package for need in missing if need.package)
    if packages and os.geteuid() == 0 and has_command("apt-get"):
        say(f"Installing {', '.join(packages)} …")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, check=False)
        missing = find_missing(missing, layers)
    for need in missing:
        how = f" (`apt-get install {need.package}` adds it)" if need.package else ""
        say(f"This machine lacks {need.name}: {need.without}{how}.")
    if "clients" in layers and not (ROOT / ".clients").exists():
        say("Other people's clients are installed from the package indexes, once: 3 GB.")


def make_environment() -> bool:
    """Make `.venv`, unless it is there; False where it can't be made, which was said then."""
    command = [sys.executable, str(ROOT / "bootstrap.py"), "env", "--dev"]
    return subprocess.run(command, cwd=str(ROOT), check=False).returncode == 0


def run_layer(layer: str) -> Outcome:
    """Run one, with its output as it comes."""
    say(f"\n=== {layer} ===")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [PYTHON, "-P", "-m", "pytest", f"--junitxml={report}", *LAYERS[layer]]
        status = subprocess.run(command, cwd=str(ROOT), env=keep_compiled(), check=False).returncode
        text = report.read_text(encoding="utf-8") if report.exists() else ""
    passed, failed, skipped = count(text, status)
    return Outcome(layer, passed, failed, skipped, time.monotonic() - began)


def keep_compiled() -> Mapping[str, str]:
    """The environment, under which Python keeps what it compiles.

    The tests start hundreds of processes, each of which would compile all modules anew.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run_lint() -> Outcome:
    """The linters, each as one test."""
    say("\n=== lint ===")
    began = time.monotonic()
    failed = 0
    for name, *rest in LINT:
        command = [str(ROOT / ".venv" / "bin" / name), *rest]
        failed += subprocess.run(command, cwd=str(ROOT), check=False).returncode != 0
    return Outcome("lint", len(LINT) - failed, failed, 0, time.monotonic() - began)


def count(report: str, status: int) -> tuple[int, int, int]:
    """Passed, failed, skipped: from pytest's report in JUnit's form and its exit status.

    A run that failed by something other than a test (it was killed, or a file can't be imported)
    counts as one failure at least.
    """
    tests = failed = skipped = 0
    try:
        suites = list(ElementTree.fromstring(report).iter("testsuite"))
    except ElementTree.ParseError:
        suites = []
    for suite in suites:
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    passed = max(0, tests - failed - skipped)
    return passed, max(failed, int(status != 0)), skipped


def build_summary(outcomes: Sequence[Outcome], wanted: Sequence[str]) -> list[str]:
    """The table, with a row for each layer that was to run, and the line that ends it all."""
    by_layer = {outcome.layer: outcome for outcome in outcomes}
    lines = [f"{'layer':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'time':>9}"]
    for layer in wanted:
        found = by_layer.get(layer)
        if found is None:
            lines.append(f"{layer:<10}{'not run':>8}")
            continue
        minutes, seconds = divmod(round(found.seconds), 60)
        counts = f"{found.passed:>8}{found.failed:>8}{found.skipped:>9}"
        lines.append(f"{layer:<10}{counts}{f'{minutes}:{seconds:02}':>9}")
    passed, failed, skipped = (sum(found[at] for found in outcomes) for at in (1, 2, 3))
    return [*lines, "", f"{passed} passed, {failed} failed, {skipped} skipped"]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when no layer failed, 1 when one did or was stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("layers", nargs="*", metavar="LAYER", help=", ".join(LAYERS))
    parser.add_argument("--lint", action="store_true", help="the linters before them")
    options = parser.parse_args(arguments)
    for layer in options.layers:
        if layer not in LAYERS:
            parser.error(f"there is no layer {layer!r}: expected one of {', '.join(LAYERS)}")
    layers = options.layers or list(LAYERS)
    wanted = [*(["lint"] if options.lint else []), *layers]
    prepare(layers)
    if not make_environment():
        return 1
    outcomes: list[Outcome] = []
    try:
        for layer in wanted:
            outcomes.append(run_lint() if layer == "lint" else run_layer(layer))
    except KeyboardInterrupt:
        say("\nStopped.")
    say("")
    for line in build_summary(outcomes, wanted):
        say(line)
    return int(len(outcomes) < len(wanted) or any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
