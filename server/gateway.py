"""The gateway process put together: database, recorder, directory, engines.

Owns: their wiring and lifetimes. Does not own: routes (`endpoints/`), rules.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from feedback.db import Database, DatabaseUnfit, new_id
from feedback.errors import AppError
from feedback.recording import interrupt_started
from server.access.callers import Callers
from server.access.limits import LimitBook, Limits
from server.access.signing import Signing, open_signing
from server.chat.directory import Directory
from server.chat.recorder import Recorder
from server.chat.routing import Snapshot
from server.chat.tracing import Tracer, build_tracer
from server.chat.writer import writer_lock
from server.cluster.leader import Leader, leading
from server.cluster.presence import present
from server.engines.base import EngineAddress
from server.engines.chooser import Chooser
from server.engines.conductor import Conductor
from server.engines.picture import Picture, Roles
from server.engines.pins import Pins
from server.engines.same_prompt import SamePrompt
from server.engines.tool_calls import ToolCalls
from server.engines.vllm import VllmEngine
from server.http.intake import Intake
from server.metrics import Figures
from server.processes.engine_record import managed_address
from server.remains import Remains
from server.settings import Settings
from tuner.adapters import AdapterRefused, AdapterStore
from tuner.base_models import BaseModel
from tuner.methods import TRAINED_TOKENS
from tuner.tables import Adapter

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Gateway:
    """What routes work with. One event loop owns it."""

    settings: Settings
    base: BaseModel
    database: Database
    recorder: Recorder
    directory: Directory
    callers: Callers
    chooser: Chooser
    pins: Pins
    tool_calls: ToolCalls
    conductor: Conductor
    store: AdapterStore
    limits: LimitBook
    signing: Signing
    remains: Remains
    figures: Figures = field(default_factory=Figures)
    intake: Intake = field(default_factory=Intake)
    id: str = field(default_factory=lambda: new_id("gw_"))
    leader: Leader = field(init=False)
    tracer: Tracer | None = None  #: None: tracing is off
    stopping: bool = False
    _moves: dict[str, asyncio.Lock] = field(default_factory=dict)
    _background: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.leader = Leader(self.database, self.id, is_wanted=lambda: not self.stopping)

    def move_lock(self, deployment: str) -> asyncio.Lock:
        """Moves of one deployment follow each other."""
        return self._moves.setdefault(deployment, asyncio.Lock())

    async def parses_tools(self) -> bool | None:
        """Whether the engines can call tools: what is set, else what they show."""
        declared = self.settings.engine.parses_tools
        return declared if declared is not None else await self.tool_calls.are_parsed()

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that nobody waits for; its failure is logged."""
        task = asyncio.ensure_future(_logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        logger.exception("Background work failed", extra={"action": "background_failed"})


def build_gateway(settings: Settings, base: BaseModel, database: Database) -> Gateway:
    """Wire a gateway; nothing runs before `running`.

    Raises DatabaseUnfit where the audit log is signed with a secret that is not here.
    """
    with database.read() as session:
        signing = open_signing(settings, database, session)
    store = AdapterStore(settings.adapters_dir)
    engine = settings.engine

    def addresses() -> Iterable[EngineAddress]:
        if not engine.urls:
            managed = managed_address(settings.run_dir)
            return [] if managed is None else [managed]
        key = engine.api_key.get_secret_value() if engine.api_key else None
        return [
            EngineAddress(f"engine-{i}", url.rstrip("/"), key) for i, url in enumerate(engine.urls)
        ]

    def path(content_hash: str) -> str:
        try:
            store.verify(content_hash)
        except AdapterRefused as error:
            raise OSError(error.message) from None
        if engine.adapters_path is not None:
            return f"{engine.adapters_path.rstrip('/')}/{content_hash}"
        return str(store.path(content_hash).resolve())

    def reference(adapter_id: str) -> Mapping[str, Any]:
        with database.read() as session:
            adapter = session.get(Adapter, adapter_id)
            if adapter is None or adapter.probe is None:
                raise OSError(f"adapter {adapter_id} has no reference figures")
            return adapter.probe

    unknown = Picture(
        base_name=base.name,
        capacity=min(engine.max_loras, engine.max_cpu_loras or engine.max_loras),
        traits={
            "base_revision": base.revision,
            "dtype": engine.dtype,
            "quantization": engine.args.get("quantization"),
        },
    )
    chooser = Chooser(
        unknown, connect=VllmEngine, look_at=lambda engine_id: conductor.look_at(engine_id)
    )
    conductor = Conductor(
        unknown,
        addresses=addresses,
        connect=VllmEngine,
        reference=reference,
        path=path,
        traffic=chooser,
        publish=chooser.show,
        find_difference=SamePrompt(
            base,
            min_model_len=engine.max_model_len or min(TRAINED_TOKENS, base.max_position_embeddings),
        ).find_difference,
    )

    @asynccontextmanager
    async def before_flip(snapshot: Snapshot) -> AsyncIterator[None]:
        """Another gateway has moved a release: have it here too before requests go to it."""
        with contextlib.ExitStack() as stack:
            for deployment in snapshot.deployments.values():
                release = deployment.production
                if chooser.picture.is_ready and not chooser.picture.serves(release):
                    stack.enter_context(conductor.keep(release))
                    try:
                        await conductor.prepare(release)
                    except AppError as error:
                        logger.warning(
                            "Production is not ready here",
                            extra={"action": "flip_unready", "reason": error.message},
                        )
            yield
            conductor.assign(_roles(snapshot))

    directory = Directory(database, base.name, before_flip, signing.tokens)
    callers = Callers(database, lambda: directory.keyring, settings.gateway.user_headers)
    dead_letters = settings.data / "dead-letters.jsonl"
    recorder = Recorder(
        database,
        dead_letters,
        own_process=settings.gateway.writer == "process",
        lock=_lock_path(database, "writer"),
        log_level=settings.log_level,
    )
    limits = LimitBook(Limits(**settings.limits.model_dump(exclude={"unfinished_jobs"})))
    remains = Remains(database, dead_letters)
    gateway = Gateway(
        settings=settings,
        base=base,
        database=database,
        recorder=recorder,
        directory=directory,
        callers=callers,
        chooser=chooser,
        pins=Pins(chooser, conductor.prepare),
        tool_calls=ToolCalls(chooser),
        conductor=conductor,
        store=store,
        limits=limits,
        signing=signing,
        remains=remains,
    )
    if settings.tracing.enabled:
        gateway.tracer = build_tracer(gateway.id)
    return gateway


def _roles(snapshot: Snapshot) -> Roles:
    required = (deployment.production for deployment in snapshot.deployments.values())
    return Roles(required=tuple(required), wanted=snapshot.roles)


@asynccontextmanager
async def running(gateway: Gateway) -> AsyncIterator[None]:
    """The gateway's life: the writer, the directory, the engines; all of it ended in order.

    Whoever starts it holds `sole_gateway`.
    """
    await asyncio.to_thread(_interrupt_leftovers, gateway.database)
    async with present(gateway.database, gateway.id), leading(gateway.leader):
        await gateway.recorder.start()
        try:
            await gateway.directory.refresh()
            interval = gateway.settings.gateway.refresh_seconds
            tasks = [
                asyncio.create_task(gateway.directory.follow(interval)),
                asyncio.create_task(gateway.conductor.follow(interval)),
                asyncio.create_task(gateway.remains.follow()),
            ]
            try:
                yield
            finally:
                tasks += gateway._background
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await gateway.tool_calls.close()
                await gateway.chooser.close()
                await gateway.conductor.close()
        finally:
            await gateway.recorder.stop()
            if gateway.tracer is not None:
                await asyncio.to_thread(gateway.tracer.close)


def _interrupt_leftovers(database: Database) -> None:
    if not database.is_sqlite:
        return  # other gateways may be answering: `present` looks who does not
    with writer_lock(_lock_path(database, "writer")), database.write() as session:
        left = interrupt_started(session)
    if left:
        logger.warning(
            "Answers of a stopped gateway ended",
            extra={"action": "leftovers_ended", "answers": left},
        )


@contextlib.contextmanager
def sole_gateway(database: Database) -> Iterator[None]:
    """One gateway per SQLite file, by a lock that the kernel gives back however the process ends.

    Raises DatabaseUnfit for a second.
    """
    lock = _lock_path(database, "gateway")
    if lock is None:
        yield
        return
    with lock.open("a+", encoding="utf-8") as file:
        _lock(file, lock)
        yield


def _lock_path(database: Database, holder: str) -> Path | None:
    """The lock file of one `holder` beside an SQLite file; None where several may be."""
    if not database.is_sqlite or not database.url.database:
        return None
    return Path(database.url.database).with_suffix(f".{holder}.lock")


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise DatabaseUnfit(
            f"another gateway (process {file.read().strip() or 'unknown'}) uses this SQLite file "
            f"(lock {path.name}); stop it first, or use PostgreSQL for several gateways"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
