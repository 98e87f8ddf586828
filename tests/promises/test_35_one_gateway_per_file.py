"""Promise 35: a second gateway on one SQLite file is refused, and no kill damages the file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from feedback import audit
from server.processes.engine import free_port
from server.settings import Settings
from tests.promise_fixtures import Figures
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import scaled
from tests.promises.traffic import Traffic

pytestmark = pytest.mark.promises


def start_second(settings: Settings, engine: str) -> subprocess.CompletedProcess[str]:
    """Another gateway on the same data, which must end by itself."""
    environment = {
        **os.environ,
        "BURNISH_DATA": str(settings.data),
        "BURNISH_PORT": str(free_port()),
        "BURNISH_MODEL__PATH": settings.model.path,
        "BURNISH_ENGINE__URLS": json.dumps([engine]),
    }
    command = [sys.executable, "-P", "-m", "server.cli", "gateway"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_second_gateway_is_refused_and_every_kill_leaves_the_file_whole(
    tmp_path: Path, figures: Figures
) -> None:
    kills, seconds = scaled(60), 0
    place = prepare(tmp_path)
    base, settings, database = place.base, place.settings, place.database
    key = place.key()
    chance, traffic = random.Random(35), Traffic([], key)
    log = tmp_path / "gateway.log"
    with engine_process() as engine:
        httpx.post(f"{engine}/fake/faults", json={"token_seconds": 0.001}, trust_env=False)
        for number in range(kills):
            with gateway_process(settings.data, base.path, engine, log) as gateway:
                if number % 10 == 0:
                    refused = start_second(settings, engine)
                    assert refused.returncode == 1
                    told = refused.stderr.strip().splitlines()[-1]
                    assert "uses this SQLite file" in told
                    assert "use PostgreSQL for several gateways" in told
                    seconds += 1
                traffic.urls = [gateway.url]
                with traffic.running():
                    traffic.wait_for(8)
                    # The kill must strike at any moment of a write.
                    time.sleep(chance.random() * 0.05)  # a kill at any moment
                    gateway.kill()
            with database.read() as session:
                assert session.scalar(text("PRAGMA integrity_check")) == "ok"
                assert session.execute(text("PRAGMA foreign_key_check")).all() == []
                audit.verify(session)
    database.dispose()
    figures(kills=kills, second_gateways=seconds, damaged=0)
