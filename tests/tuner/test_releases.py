"""Releases: how they are numbered and named, listed and put away."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from feedback.db import Database
from feedback.errors import Conflict, NotFound
from tests.tuner.records import make_adapter, make_candidate, make_candidates, make_deployment
from tuner import deployments, moves, releases
from tuner.tables import Deployment, Release, ReleaseState


def test_candidates_are_numbered_in_turn_whoever_makes_them_at_once(database: Database) -> None:
    with database.write() as session:
        make_deployment(session)
        for seed in range(4):
            make_adapter(session, seed)

    def make(seed: int) -> str:
        with database.write() as session:
            deployment = deployments.get_deployment(session, "assistant")
            return releases.create_release(
                session, deployment, adapter=None, system_prompt=str(seed), sampling={}
            ).name

    with ThreadPoolExecutor(4) as threads:
        names = list(threads.map(make, range(4)))
    assert sorted(names) == [f"assistant@{number}" for number in range(1, 5)]


def test_one_adapter_has_one_engine_name_in_a_deployment(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        make_deployment(session, "second")
        first = make_candidate(session)
        adapter = session.get_one(releases.Adapter, first.adapter_id)
        assert first.engine_name == f"assistant-1-{adapter.content_hash[:8]}"
        again = releases.create_release(
            session, deployment, adapter=adapter, system_prompt="Other.", sampling={}
        )
        assert (again.name, again.engine_name) == ("assistant@2", first.engine_name)
        elsewhere = make_candidate(session, "second", adapter=adapter, seed=9)
        assert elsewhere.engine_name.startswith("second-1-")


def test_an_adapter_of_another_base_makes_no_release(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        adapter = make_adapter(session, base_revision="rev-2")
        with pytest.raises(Conflict, match="trained for 'tiny' at 'rev-2'") as refused:
            releases.create_release(
                session, deployment, adapter=adapter, system_prompt=None, sampling={}
            )
        assert refused.value.code == "wrong_base"


def test_releases_are_listed_newest_first_by_deployment(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        make_deployment(session, "second")
        make_candidate(session)
        page, more = releases.list_releases(session, limit=2)
        assert ([row.name for row in page], more) == (["assistant@1", "assistant@0"], True)
        rest, more = releases.list_releases(session, after="assistant@0")
        assert ([row.name for row in rest], more) == (["second@0"], False)
        with pytest.raises(NotFound, match="No release 'assistant@9'"):
            releases.list_releases(session, after="assistant@9")


@pytest.mark.parametrize(("role", "number"), [("production", 1), ("previous", 0), ("canary", 2)])
def test_a_release_with_a_role_is_not_discarded(database: Database, role: str, number: int) -> None:
    make_candidates(database)
    with database.write() as session:
        moves.move_production(session, "assistant", 1, expected_generation=0)
        deployments.get_deployment(session, "assistant").canary = 2
    with database.write() as session, pytest.raises(Conflict, match=f"is {role} of"):
        releases.discard(session, f"assistant@{number}")


def test_what_an_engine_shows_does_not_revive_a_discarded_release(
    sqlite_database: Database,
) -> None:
    make_candidates(sqlite_database)
    with sqlite_database.write() as session:
        releases.discard(session, "assistant@1")
        assert releases.set_unproven(session, "assistant@1", "noise").state == "discarded"
        failed = releases.mark_failed(session, "assistant@2", "no effect")
        assert (failed.state, failed.state_reason) == (ReleaseState.FAILED, "no effect")


def test_unknown_names_are_not_found(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        for call in (
            lambda: deployments.get_deployment(session, "nobody"),
            lambda: releases.get_release(session, "nobody@1"),
            lambda: moves.move_production(session, "nobody", 1, expected_generation=0),
            lambda: moves.swap_back(session, "nobody", expected_generation=0),
        ):
            with pytest.raises(NotFound, match="nobody"):
                call()
        assert session.get(Deployment, "nobody") is None
        assert session.get(Release, "nobody@0") is None
