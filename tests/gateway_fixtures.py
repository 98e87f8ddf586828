"""A whole gateway in a thread, over fake engines and a database that the test chose.

`start_gateway` serves the real application with uvicorn on a free port; what a test holds is its
address, its keys, and the `Gateway` behind it. Deployment `assistant` stands on the base `tiny`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
import uvloop

from feedback.db import Database, new_id, now
from server.access.keys import create_key
from server.access.scopes import Scope
from server.app import build_config, create_app
from server.deployments import promotion
from server.deployments.promotion import Move
from server.engines.base import EngineAddress
from server.gateway import Gateway, build_gateway, sole_gateway
from server.processes.engine import free_port
from server.settings import (
    EngineSettings,
    GatewaySettings,
    LimitSettings,
    Settings,
    TracingSettings,
)
from tests.fake_engine import BASE as BASE_SIGNATURE
from tests.fake_engine import FakeEngine, fake_logprobs, fake_signature
from tests.tiny_adapters import TARGET_MODULES, build_tiny_adapter
from tests.tiny_model import SPECIAL_TOKENS
from tuner.adapters import AdapterStore, adapter_id, build_adapter_config
from tuner.base_models import BaseModel
from tuner.chat_template import ChatTemplate
from tuner.control_tokens import ControlTokens
from tuner.deployments import create_deployment, get_deployment
from tuner.releases import create_release
from tuner.tables import Adapter, Deployment, Evaluation

#: As the fake engine renders: nothing is put before a conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BASE = BaseModel(
    name="tiny",
    path=Path("/models/tiny"),
    revision="sha256-tiny",
    template_hash="template-tiny",
    architecture="llama",
    max_position_embeddings=131_072,
    vocab_size=320,
    eos_token_ids=(2,),
    linear_modules={},
    chat_template=ChatTemplate(CHAT_TEMPLATE),
    control_tokens=ControlTokens.of(SPECIAL_TOKENS, (), [CHAT_TEMPLATE]),
)
T = TypeVar("T")

MAX_LORAS = 4
SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PROBE = [[72, 101, 108, 108, 111, 32, 119, 111], [65, 110, 111, 116, 104, 101, 114]]

EVERY_SCOPE = tuple(scope for scope in Scope if scope is not Scope.INTERNAL)


@dataclass
class RunningGateway:
    """A gateway that answers at `url`."""

    url: str
    gateway: Gateway
    admin_key: str
    worker_key: str
    _loop: asyncio.AbstractEventLoop
    _clients: list[httpx.Client]

    @property
    def database(self) -> Database:
        return self.gateway.database

    def key(self, user: str, *scopes: str, **more: Any) -> str:
        """A new key, in force at once; by default of somebody who chats and rates."""
        with self.database.write() as session:
            _, token = create_key(session, user=user, scopes=scopes or ("chat", "feedback"), **more)
        self.refresh()
        return token

    def client(self, key: str | None = None) -> httpx.Client:
        """A client with that key (None: the administrator's); closed with the gateway."""
        client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key or self.admin_key}"},
            timeout=30,
            trust_env=False,
        )
        self._clients.append(client)
        return client

    def candidate(self, seed: int, *, decision: str | None = "pass", **more: Any) -> Candidate:
        """A new release of `assistant` with an adapter of its own, by default evaluated and passed.

        Same seed: same weights. `more` goes to `create_release`.
        """
        return make_candidate(self.database, self.gateway.store, seed, decision=decision, **more)

    def promote(self, release: str, **move: Any) -> Deployment:
        """Promote as an administrator would; by default with force and a note."""
        move = {"actor": "admin", "note": "for a test", "force": True, **move}
        return self.run(promotion.promote(self.gateway, "assistant", release, Move(**move)))

    def rollback(self) -> Deployment:
        return self.run(promotion.rollback(self.gateway, "assistant", Move(actor="admin")))

    def reconcile(self) -> None:
        """Have all engines looked at; returns afterwards."""
        self.run(self.gateway.conductor.reconcile())

    def set_capacity(self, adapters: int) -> None:
        """How many adapters an engine may hold from now on, by the settings."""
        self.gateway.conductor.loader.capacity = adapters
        self.reconcile()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the gateway's own loop; its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def refresh(self) -> None:
        """Have the gateway read keys and deployments again; returns afterwards."""
        self.run(self.gateway.directory.refresh())

    def count(self, figure: str) -> list[tuple[dict[str, str], int]]:
        """A counter of the gateway as it stands: its labels, and how many."""
        families = self.gateway.figures.registry.collect()
        samples = (family.samples for family in families if family.name == figure)
        return [(sample.labels, int(sample.value)) for sample in next(samples)]


@dataclass(frozen=True)
class Candidate:
    """A release that can be promoted, and the signature by which its answers are known."""

    name: str
    signature: str
    engine_name: str
    content_hash: str


def make_candidate(
    database: Database,
    store: AdapterStore,
    seed: int,
    *,
    base: BaseModel = BASE,
    decision: str | None = "pass",
    **more: Any,
) -> Candidate:
    """A new release of `assistant`, without a gateway: its adapter in the store, its rows."""
    with tempfile.TemporaryDirectory() as folder:
        content_hash = store.put(build_adapter(Path(folder), seed, base))
    signature = fake_signature(store.path(content_hash))
    with database.write() as session:
        adapter = session.get(Adapter, adapter_id(content_hash))
        if adapter is None:
            adapter = _adapter_row(content_hash, signature, base)
            session.add(adapter)
            session.flush()
        deployment = get_deployment(session, "assistant")
        more = {"system_prompt": None, "sampling": {}, **more}
        release = create_release(session, deployment, adapter=adapter, **more)
        if decision is not None:
            baseline = f"assistant@{deployment.production}"
            session.add(_evaluation_row(release.name, baseline, decision))
        return Candidate(release.name, signature, release.engine_name, content_hash)


def build_adapter(folder: Path, seed: int, base: BaseModel = BASE, **config: Any) -> Path:
    """An adapter for `base` in `folder`; `config` changes its configuration."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    adapter = build_tiny_adapter(folder, folder / "adapter", seed=seed)
    options = {"r": 8, "lora_alpha": 16, "target_modules": TARGET_MODULES}
    options |= {"base_name": base.name, "base_revision": base.revision}
    written = build_adapter_config(**options)
    (adapter / "adapter_config.json").write_text(json.dumps({**json.loads(written), **config}))
    return adapter


def _adapter_row(content_hash: str, signature: str, base: BaseModel) -> Adapter:
    return Adapter(
        id=adapter_id(content_hash),
        content_hash=content_hash,
        r=8,
        lora_alpha=16.0,
        target_modules=list(TARGET_MODULES),
        base_model=base.name,
        base_revision=base.revision,
        template_hash=base.template_hash,
        bytes=1,
        probe={
            "prompts": PROBE,
            "base": [fake_logprobs(BASE_SIGNATURE, ids) for ids in PROBE],
            "adapter": [fake_logprobs(signature, ids) for ids in PROBE],
        },
    )


def _evaluation_row(release: str, baseline: str, decision: str) -> Evaluation:
    return Evaluation(
        id=new_id("eval_"),
        deployment="assistant",
        release=release,
        baseline=baseline,
        decision=decision,
        reasons=["measured"],
        finished_at=now(),
    )


@contextmanager
def start_gateway(
    database: Database,
    data: Path,
    engines: Sequence[EngineAddress],
    *,
    tracing: bool = False,
    limits: LimitSettings | None = None,
    **options: Any,
) -> Iterator[RunningGateway]:
    """Serve a gateway over `engines` until the block ends; `options` are gateway settings."""
    settings = Settings(
        data=data,
        port=free_port(),
        engine=EngineSettings(
            urls=[engine.url for engine in engines],
            api_key=engines[0].api_key,
            max_loras=MAX_LORAS,
        ),
        gateway=GatewaySettings(**{"refresh_seconds": 0.1, "writer": "thread", **options}),
        limits=limits or LimitSettings(),
        tracing=TracingSettings(enabled=tracing),
    )
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with database.write() as session:
        if session.get(Deployment, "assistant") is None:
            create_deployment(
                session,
                name="assistant",
                base_model=BASE.name,
                base_revision=BASE.revision,
                template_hash=BASE.template_hash,
                aliases=["gpt-4o-mini"],
            )
        _, admin_key = create_key(session, user="admin", scopes=["admin"])
        _, worker_key = create_key(session, user="worker", scopes=["internal"])
    gateway = build_gateway(settings, BASE, database)
    app, started = create_app(gateway), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    config = build_config(app, settings)
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.ensure_future(server.serve())
        while not (server.started and gateway.chooser.picture.is_ready) and not serving.done():
            await asyncio.sleep(0.01)
        started.set()
        await serving

    def run() -> None:
        with (
            sole_gateway(database),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(serve())

    thread = threading.Thread(target=run, name="gateway")
    thread.start()
    clients: list[httpx.Client] = []
    try:
        assert started.wait(30), gateway.chooser.picture.explain_not_ready()
        assert server.started
        url = f"http://127.0.0.1:{settings.port}"
        yield RunningGateway(url, gateway, admin_key, worker_key, loops[0], clients)
    finally:
        for client in clients:
            client.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def gateway_engine() -> Iterator[FakeEngine]:
    """A fake engine with as many slots as the gateway counts on."""
    with FakeEngine(model=BASE.name, api_key="secret", max_loras=MAX_LORAS) as engine:
        yield engine


@pytest.fixture
def running_gateway(
    database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> Iterator[RunningGateway]:
    """A gateway over one fake engine, on SQLite and on PostgreSQL."""
    with start_gateway(database, tmp_path / "data", [gateway_engine.address]) as running:
        yield running


@pytest.fixture
def sqlite_gateway(
    sqlite_database: Database, gateway_engine: FakeEngine, tmp_path: Path
) -> Iterator[RunningGateway]:
    """A gateway over one fake engine, on SQLite alone."""
    with start_gateway(sqlite_database, tmp_path / "data", [gateway_engine.address]) as running:
        yield running
