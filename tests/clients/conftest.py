"""What the clients' tests share: environments, one Burnish, and what each client's program found.

A client's program runs once, with all of its scenarios; the tests read its report.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import (
    CLIENTS,
    OPEN_WEBUI,
    Client,
    NotInstalled,
    are_required,
    make_all,
)
from tests.clients.service import Service, start_service

PROGRAM_SECONDS = 120.0
CHAT = ("chat", "streamed_chat", "tools", "json_schema", "for_others", "errors")
OPENAI = ("models", "stored_completions", "files", "fine_tuning")


class Report:
    """What a client's program found, scenario by scenario."""

    def __init__(self, client: Client, found: dict[str, dict[str, Any]]) -> None:
        self.client = client
        self._found = found

    def __getitem__(self, scenario: str) -> dict[str, Any]:
        """The facts of a scenario; where it failed in the program, the test fails with that."""
        facts = self._found[scenario]
        if "failure" in facts:
            pytest.fail(f"{self.client.version}, {scenario}:\n{facts['failure']}", pytrace=False)
        return facts


@pytest.fixture(scope="session")
def environments(request: pytest.FixtureRequest) -> dict[str, Future[None]]:
    """The environments of the clients whose tests are about to run, in the making."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {spec.params["client"] for spec in callspecs if spec and "client" in spec.params}
    front_ends = {"open_webui": OPEN_WEBUI}
    names = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    wanted_front_ends = [client for name, client in front_ends.items() if name in names]
    # The front end takes the longest by far: it begins first.
    return make_all([*wanted_front_ends, *(CLIENTS[name] for name in CLIENTS if name in wanted)])


@pytest.fixture(scope="session", params=CLIENTS)
def client(request: pytest.FixtureRequest, environments: dict[str, Future[None]]) -> Client:
    """A client whose environment is there."""
    return _installed(CLIENTS[request.param], environments)


@pytest.fixture(scope="session")
def open_webui(environments: dict[str, Future[None]]) -> Client:
    """Open WebUI, whose environment is there."""
    return _installed(OPEN_WEBUI, environments)


def _installed(client: Client, environments: dict[str, Future[None]]) -> Client:
    try:
        environments[client.name].result()
    except NotInstalled as error:
        if are_required():
            pytest.fail(f"{client.name} is not installed: {error}", pytrace=False)
        pytest.skip(f"{client.name} can't be installed: {error}")
    return client


@pytest.fixture(scope="session")
def service(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, environments: object
) -> Iterator[Service]:
    """One Burnish for all clients; it starts while their environments are made."""
    with start_service(tmp_path_factory.mktemp("service"), tiny_model) as running:
        yield running


@pytest.fixture(scope="session")
def plain_environment() -> dict[str, str]:
    """The variables of whoever runs the tests, without proxies and settings of theirs."""
    names = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in names if name in os.environ}


@pytest.fixture(scope="session")
def environment(
    client: Client, service: Service, plain_environment: dict[str, str]
) -> dict[str, str]:
    """The variables that the client's program is started with."""
    return {**plain_environment, **service.environment(client.name)}


@pytest.fixture(scope="session")
def report(client: Client, environment: dict[str, str]) -> Report:
    """What the client's program found in all of its scenarios."""
    tools = () if client.name == "llm" else ("streamed_tools",)
    scenarios = [*CHAT, *tools, *(OPENAI if client.is_openai else ())]
    return run_program(client, environment, *scenarios)


def run_program(
    client: Client,
    environment: dict[str, str],
    *scenarios: str,
    seconds: float = PROGRAM_SECONDS,
) -> Report:
    """Run the client's program in its environment."""
    done = subprocess.run(
        [*client.command, *scenarios],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{client.version}: {done.stderr[-4000:]}"
    return Report(client, json.loads(done.stdout))
