"""What the gateway answers from memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from feedback.db import Database
from server.chat.directory import MOST_SERVED, Directory, load_release, load_snapshot
from server.chat.routing import Snapshot
from tuner import deployments, moves, releases

pytestmark = pytest.mark.anyio


@pytest.fixture
def deployed(database: Database) -> Database:
    with database.write() as session:
        row = deployments.create_deployment(
            session,
            name="assistant",
            base_model="tiny",
            base_revision="r",
            template_hash="t",
            aliases=["gpt-4o-mini"],
            policies={"system_prompt": "prepend", "template_kwargs": ["thinking"]},
        )
        for number in (1, 2, 3):
            prompt = f"prompt {number}"
            releases.create_release(session, row, adapter=None, system_prompt=prompt, sampling={})
        moves.move_production(session, "assistant", 1, expected_generation=0)
        moves.move_production(session, "assistant", 2, expected_generation=1)
        moves.swap_back(session, "assistant", expected_generation=2)
    return database


def test_a_snapshot_has_roles_policies_aliases_and_what_is_named_beyond(
    deployed: Database,
) -> None:
    with deployed.read() as session:
        snapshot = load_snapshot(session, "tiny", ["assistant@3", "assistant@99"])
    view = snapshot.deployments["assistant"]
    assert (view.production.name, view.generation) == ("assistant@1", 3)
    assert view.previous is not None
    assert (view.previous.name, view.rolled_back) == ("assistant@2", True)
    assert view.canary is None
    assert (view.prepend, view.template_kwargs) == (True, frozenset({"thinking"}))
    assert snapshot.aliases == {"gpt-4o-mini": "assistant"}
    assert snapshot.served.keys() == {"assistant@1", "assistant@2", "assistant@3"}
    assert snapshot.served["assistant@3"].system_prompt == "prompt 3"


def test_a_release_that_is_not_there_is_none(deployed: Database) -> None:
    with deployed.read() as session:
        assert load_release(session, "assistant@99") is None


async def test_engines_are_made_ready_before_answers_go_by_a_new_snapshot(
    deployed: Database,
) -> None:
    seen: list[tuple[int, int]] = []

    @asynccontextmanager
    async def before_flip(snapshot: Snapshot) -> AsyncIterator[None]:
        seen.append((len(directory.snapshot.deployments), len(snapshot.deployments)))
        yield
        seen.append((len(directory.snapshot.deployments), len(snapshot.deployments)))

    directory = Directory(deployed, "tiny", before_flip)
    await directory.refresh()
    assert seen == [(0, 1), (1, 1)]


async def test_the_newest_releases_beyond_the_roles_are_remembered(deployed: Database) -> None:
    directory = Directory(deployed, "tiny")
    directory.remember("assistant@3")
    for number in range(100, 100 + MOST_SERVED - 1):
        directory.remember(f"assistant@{number}")
    await directory.refresh()
    assert "assistant@3" in directory.snapshot.served
    directory.remember("assistant@9999")
    await directory.refresh()
    assert "assistant@3" not in directory.snapshot.served
