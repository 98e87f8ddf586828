"""One whole Burnish for the clients, and beside it gateways whose engines have a fault.

Gateway, worker, trainer and engine are processes, as `burnish serve` has them; the model is tiny
and random, the engine the fake one, the training real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

import tuner.tables  # noqa: F401 - imported for its tables, which `create_all` makes too
from feedback.db import Base, Database
from server.cli.api import read_credentials
from server.engines.base import EngineAddress
from server.processes.engine import free_port
from server.settings import Settings
from server.setup.upgrade import upgrade
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import BASE, RunningGateway, start_gateway
from tests.promises.processes import engine_process, gateway_process
from tests.tiny_model import DEFAULT_SYSTEM
from tuner.base_models import describe_base

Place = dict[str, str]
"""Where a client goes, and as whom: `base_url` and `api_key`."""


@dataclass(frozen=True)
class Service:
    """A Burnish that runs, and the administrator's way in."""

    url: str
    admin: httpx.Client
    faulty: dict[str, Place]  #: gateways whose engine fails in mid-stream, at once, or is gone
    log: Path  #: of gateway and worker

    def key(self, user: str, *scopes: str, **more: Any) -> str:
        body = {"user": user, "scopes": scopes, **more}
        made = self.admin.post("/admin/keys", json=body).raise_for_status().json()
        return str(made["key"])

    def place(self, api_key: str) -> Place:
        return {"base_url": f"{self.url}/v1", "api_key": api_key}

    def environment(self, client: str) -> dict[str, str]:
        """What a program is told: OpenAI's own variables, and where else it may knock."""
        limited = self.key(f"{client}-limited", "chat", limits={"requests_per_minute": 1})
        nobody = f"http://127.0.0.1:{free_port()}/v1"
        elsewhere = {
            **self.faulty,
            "wrong_key": self.place("sk-burnish-nobody"),
            "without_scope": self.place(self.key(f"{client}-rater", "feedback")),
            "at_limit": self.place(limited),
            "nobody_there": {"base_url": nobody, "api_key": limited},
        }
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.key(client, "chat", "feedback", "tune"),
            "APPLICATION_KEY": self.key(f"{client}-application", "chat", end_users=True),
            "ELSEWHERE": json.dumps(elsewhere),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would ask the network for prices
        }

    def promote(self, release: str) -> None:
        """As an administrator who knows that this engine's figures prove nothing."""
        body = {"release": release, "note": "the fake engine has figures of its own", "force": True}
        url = "/admin/deployments/assistant/promote"
        self.admin.post(url, json=body).raise_for_status()

    def problems(self) -> list[str]:
        """What gateway and worker have logged that is worse than news."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if '"level": "info"' not in line]


@contextmanager
def start_service(
    folder: Path, model: Path, engine: EngineAddress | None = None
) -> Iterator[Service]:
    """A Burnish on the model in `model`, with its data in `folder`, until the block ends.

    Over `engine`, which has room for two adapters; without one over the fake engine, and with the
    faulty gateways beside it.
    """
    data = folder / "data"
    database = Database(Settings(data=data).database_url)
    upgrade(Settings(data=data), database, describe_base(model, model.name), url="")
    database.dispose()
    headers = {"authorization": f"Bearer {read_credentials(data)['api_key']}"}
    log, settings, faulty = folder / "burnish.log", {}, {}
    with ExitStack() as stack:
        if engine is None:
            url = stack.enter_context(engine_process("--default-system", DEFAULT_SYSTEM))
            faulty = stack.enter_context(_faulty_gateways(folder))
        else:
            url = engine.url
            settings = {"BURNISH_ENGINE__MAX_LORAS": "2"}
            settings["BURNISH_ENGINE__API_KEY"] = str(engine.api_key)
        gateway = stack.enter_context(gateway_process(data, model, url, log, **settings))
        stack.enter_context(_worker_process(data, model, gateway.url, log))
        options: dict[str, Any] = {"headers": headers, "timeout": 60, "trust_env": False}
        admin = stack.enter_context(httpx.Client(base_url=gateway.url, **options))
        yield Service(gateway.url, admin, faulty, log)


@contextmanager
def _worker_process(data: Path, model: Path, gateway: str, log: Path) -> Iterator[None]:
    """`burnish worker`, which starts the trainer; ended with its children."""
    environment = {
        **os.environ,
        "BURNISH_DATA": str(data),
        "BURNISH_MODEL__PATH": str(model),
        "BURNISH_WORKER__GATEWAY_URL": gateway,
        "BURNISH_WORKER__POLL_SECONDS": "0.1",
    }
    command = [sys.executable, "-P", "-m", "server.cli", "worker"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()  # it ends its trainer itself
        try:
            process.wait(30)
        finally:
            process.kill()


@contextmanager
def _faulty_gateways(folder: Path) -> Iterator[dict[str, Place]]:
    with ExitStack() as stack:
        places = {}
        for name, faults in (
            ("breaks_off", Faults(errs_after_tokens=3)),
            ("fails", Faults(error_status=500)),
            ("not_ready", Faults()),
        ):
            engine = stack.enter_context(ExitStack())
            fake = engine.enter_context(FakeEngine(model=BASE.name, api_key="secret"))
            fake.faults = faults
            gateway = stack.enter_context(start_gateway_alone(folder / name, fake))
            key = gateway.key("somebody", "chat")
            places[name] = {"base_url": f"{gateway.url}/v1", "api_key": key}
            if name == "not_ready":
                engine.close()  # the engine goes, and the gateway has noticed
                gateway.reconcile()
        yield places


@contextmanager
def start_gateway_alone(folder: Path, engine: FakeEngine) -> Iterator[RunningGateway]:
    """A gateway in this process over one fake engine, with a database in `folder`."""
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'burnish.sqlite3'}")
    Base.metadata.create_all(database.engine)
    try:
        with start_gateway(database, folder / "data", [engine.address]) as running:
            yield running
    finally:
        database.dispose()
