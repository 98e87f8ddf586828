"""Releases and deployments: names, numbers, who may be promoted, and the moves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from feedback.db import Database
from feedback.errors import AppError, BadRequest, Conflict, NotFound
from tests.tuner.records import decide_evaluation, make_adapter, make_candidate, make_deployment
from tuner import deployments, moves, releases
from tuner.releases import Role
from tuner.tables import Decision, Deployment, Release, ReleaseState


def test_a_deployment_begins_with_its_base_as_release_0(database: Database) -> None:
    with database.write() as session:
        make_deployment(session, system_prompt="Be kind.", sampling={"temperature": 0.2})
    with database.read() as session:
        deployment = deployments.get_deployment(session, "assistant")
        origin = releases.production_of(session, deployment)
        assert (origin.name, origin.adapter_id, origin.engine_name) == ("assistant@0", None, "tiny")
        assert (origin.system_prompt, origin.sampling) == ("Be kind.", {"temperature": 0.2})
        assert releases.role_of(deployment, 0) == Role.PRODUCTION
        assert (deployment.previous, deployment.generation) == (None, 0)


@pytest.mark.parametrize("name", ["", "Assistant", "-a", "a b", "a@1", "a/b", "../a", "a" * 65])
def test_a_name_that_cannot_stand_in_a_url_is_refused(sqlite_database: Database, name: str) -> None:
    with sqlite_database.write() as session, pytest.raises(BadRequest, match="can't name"):
        make_deployment(session, name)


@pytest.mark.parametrize(
    ("name", "by"),
    [("assistant", "a deployment"), ("gpt-4o", "an alias"), ("tiny", "the name of a base model")],
)
def test_no_name_means_two_things(database: Database, name: str, by: str) -> None:
    with database.write() as session:
        make_deployment(session, aliases=["gpt-4o"])
        make_deployment(session, "second")
    with database.write() as session:
        with pytest.raises(Conflict, match=f"already {by}") as refused:
            make_deployment(session, name)
        assert refused.value.code == "name_taken"
        with pytest.raises(Conflict, match=f"already {by}"):
            deployments.set_aliases(session, "second", [name])


def test_aliases_are_replaced_and_lead_to_their_deployment(database: Database) -> None:
    with database.write() as session:
        make_deployment(session, aliases=["gpt-4o", "org/Model:1"])
        deployments.set_aliases(session, "assistant", ["gpt-5", "gpt-5"])
    with database.read() as session:
        assert deployments.list_aliases(session, "assistant") == ["gpt-5"]
        found = deployments.find_deployment_by_model(session, "gpt-5")
        assert found is not None
        assert found.name == "assistant"
        assert deployments.find_deployment_by_model(session, "gpt-4o") is None
    with database.write() as session, pytest.raises(BadRequest, match="can't be an alias"):
        deployments.set_aliases(session, "assistant", ["a b"])


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


PERSON = {"by_machine": False, "note": None, "force": False}
NOTED = {**PERSON, "note": "looks better to me"}
FORCED = {**NOTED, "force": True}
MACHINE = {**PERSON, "by_machine": True}


@pytest.mark.parametrize(
    ("decision", "state", "by", "code"),
    [
        (Decision.PASS, ReleaseState.CANDIDATE, PERSON, "allowed"),
        (Decision.PASS, ReleaseState.CANDIDATE, MACHINE, "allowed"),
        (Decision.INCONCLUSIVE, ReleaseState.CANDIDATE, NOTED, "allowed"),
        (Decision.INCONCLUSIVE, ReleaseState.CANDIDATE, PERSON, "evaluation_inconclusive"),
        (
            Decision.INCONCLUSIVE,
            ReleaseState.CANDIDATE,
            {**MACHINE, "note": "please"},
            "evaluation_inconclusive",
        ),
        (Decision.FAIL, ReleaseState.CANDIDATE, NOTED, "evaluation_failed"),
        (Decision.FAIL, ReleaseState.CANDIDATE, FORCED, "allowed"),
        (None, ReleaseState.CANDIDATE, NOTED, "not_evaluated"),
        (None, ReleaseState.CANDIDATE, FORCED, "allowed"),
        (None, ReleaseState.CANDIDATE, {**FORCED, "note": "  "}, None),
        (Decision.PASS, ReleaseState.CANDIDATE, {**FORCED, "by_machine": True}, None),
        (Decision.PASS, ReleaseState.UNPROVEN, PERSON, "unproven"),
        (Decision.PASS, ReleaseState.UNPROVEN, NOTED, "allowed"),
        (Decision.PASS, ReleaseState.UNPROVEN, {**MACHINE, "note": "please"}, "unproven"),
        (Decision.PASS, ReleaseState.FAILED, FORCED, "release_failed"),
        (Decision.PASS, ReleaseState.DISCARDED, FORCED, "release_discarded"),
    ],
)
def test_who_may_promote_what(
    sqlite_database: Database,
    decision: Decision | None,
    state: ReleaseState,
    by: dict[str, Any],
    code: str | None,
) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        release = make_candidate(session)
        release.state = state
        if decision is not None:
            decide_evaluation(session, release, decision=decision)
        if code == "allowed":
            evaluation = moves.check_promotable(session, deployment, release, **by)
            assert (evaluation.decision if evaluation else None) == decision
        else:
            with pytest.raises(AppError) as refused:
                moves.check_promotable(session, deployment, release, **by)
            assert refused.value.code == code


def test_an_evaluation_against_what_was_in_production_is_stale(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        first, second = make_candidate(session), make_candidate(session, seed=2)
        decide_evaluation(session, second)
        deployment = moves.move_production(session, "assistant", 1, expected_generation=0)
        with pytest.raises(Conflict, match="compared with 'assistant@0'") as refused:
            moves.check_promotable(session, deployment, second, **NOTED)
        assert refused.value.code == "stale_evaluation"
        moves.check_promotable(session, deployment, second, **FORCED)
        with pytest.raises(Conflict, match="already production"):
            moves.check_promotable(session, deployment, first, **FORCED)


def test_the_newest_decided_evaluation_counts(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        release = make_candidate(session)
        decide_evaluation(session, release, decision=Decision.PASS)
        decide_evaluation(session, release, decision=Decision.FAIL)
        with pytest.raises(Conflict, match="It is a fail"):
            moves.check_promotable(session, deployment, release, **NOTED)


def test_a_release_of_another_deployment_is_not_promoted(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        make_deployment(session, "second")
        other = make_candidate(session, "second")
        with pytest.raises(BadRequest, match="a release of 'second'"):
            moves.check_promotable(session, deployment, other, **FORCED)


def prepare(database: Database, candidates: int = 2) -> None:
    with database.write() as session:
        make_deployment(session)
        for seed in range(candidates):
            make_candidate(session, seed=seed)


def roles(database: Database) -> tuple[int, int | None, int]:
    with database.read() as session:
        row = deployments.get_deployment(session, "assistant")
        return row.production, row.previous, row.generation


def test_a_move_is_made_once_whoever_tries_at_once(database: Database) -> None:
    prepare(database)

    def move(number: int) -> str:
        try:
            with database.write() as session:
                moves.move_production(session, "assistant", number, expected_generation=0)
            return "moved"
        except Conflict as error:
            return str(error.code)

    with ThreadPoolExecutor(2) as threads:
        outcomes = sorted(threads.map(move, (1, 2)))
    assert outcomes == ["generation_conflict", "moved"]
    production, previous, generation = roles(database)
    assert production in (1, 2)
    assert (previous, generation) == (0, 1)


def test_a_move_ends_a_canary(database: Database) -> None:
    prepare(database)
    with database.write() as session:
        row = deployments.get_deployment(session, "assistant")
        row.canary, row.canary_percent, row.canary_id = 2, 10.0, "canary_1"
    with database.write() as session:
        row = moves.move_production(session, "assistant", 1, expected_generation=0)
        assert (row.canary, row.canary_percent, row.canary_id) == (None, 0.0, None)


def test_what_is_production_already_is_not_moved(database: Database) -> None:
    prepare(database)
    with database.write() as session, pytest.raises(Conflict) as refused:
        moves.move_production(session, "assistant", 0, expected_generation=0)
    assert refused.value.code == "already_production"
    assert roles(database) == (0, None, 0)


def test_a_release_put_away_meanwhile_does_not_become_production(database: Database) -> None:
    prepare(database)
    with database.write() as session:
        releases.discard(session, "assistant@1", reason="typo")
    with pytest.raises(Conflict, match="is discarded"), database.write() as session:
        moves.move_production(session, "assistant", 1, expected_generation=0)
    assert roles(database) == (0, None, 0)


def test_rollback_restores_the_previous_release_and_can_be_undone(database: Database) -> None:
    prepare(database)
    with database.write() as session:
        with pytest.raises(Conflict) as refused:
            moves.swap_back(session, "assistant", expected_generation=0)
        assert refused.value.code == "nothing_to_roll_back_to"
    with database.write() as session:
        moves.move_production(session, "assistant", 1, expected_generation=0)
    with database.write() as session:
        row = moves.swap_back(session, "assistant", expected_generation=1)
        assert row.rolled_back
    assert roles(database) == (0, 1, 2)
    with pytest.raises(Conflict) as refused, database.write() as session:
        moves.swap_back(session, "assistant", expected_generation=1)
    assert refused.value.code == "generation_conflict"
    with database.write() as session:
        moves.swap_back(session, "assistant", expected_generation=2)
    assert roles(database) == (1, 0, 3)


@pytest.mark.parametrize(("role", "number"), [("production", 1), ("previous", 0), ("canary", 2)])
def test_a_release_with_a_role_is_not_discarded(database: Database, role: str, number: int) -> None:
    prepare(database)
    with database.write() as session:
        moves.move_production(session, "assistant", 1, expected_generation=0)
        deployments.get_deployment(session, "assistant").canary = 2
    with database.write() as session, pytest.raises(Conflict, match=f"is {role} of"):
        releases.discard(session, f"assistant@{number}")


def test_what_an_engine_shows_does_not_revive_a_discarded_release(
    sqlite_database: Database,
) -> None:
    prepare(sqlite_database)
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
