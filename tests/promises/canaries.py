"""Texts that stand nowhere else, and the service whose logs are searched for them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from feedback.db import Base, Database
from server.settings import DatabaseSettings, ModelSettings, Settings
from server.setup.upgrade import upgrade
from tests.promises.processes import build_model, engine_process
from tuner.base_models import BaseModel


class Canaries:
    """Texts that stand nowhere else, by the place that they are put in."""

    def __init__(self) -> None:
        self.by_place: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        return self.by_place.setdefault(place, f"canary{secrets.token_hex(12)}")


@contextmanager
def service(
    database: Database, folder: Path, base: BaseModel | None = None, *engine_options: str
) -> Iterator[tuple[Settings, str]]:
    """A data directory with its first keys, and an engine; the settings and its address."""
    base = base or build_model(folder / "tiny")
    settings = Settings(
        data=folder / "data",
        model=ModelSettings(path=str(base.path)),
        database=DatabaseSettings(url=database.url.render_as_string(hide_password=False)),
    )
    settings.data.mkdir(exist_ok=True)
    if not database.is_sqlite:
        # Its tables are there already; the migrations make theirs in an empty one.
        Base.metadata.drop_all(database.engine)
    upgrade(settings, database, base, url="http://127.0.0.1")
    with engine_process(*engine_options) as engine:
        yield settings, engine


def variables(database: Database) -> dict[str, str]:
    return {"BURNISH_DATABASE__URL": database.url.render_as_string(hide_password=False)}


def client(url: str, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)


def wait_for(caller: httpx.Client, status: int, path: str = "/v1/models") -> None:
    deadline = time.monotonic() + 30
    while caller.get(path).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)  # another process has no event to wait for
