"""Moves: who may be promoted, and that each move is made once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from feedback.db import Database
from feedback.errors import AppError, BadRequest, Conflict
from tests.tuner.records import decide_evaluation, make_candidate, make_candidates, make_deployment
from tuner import deployments, moves, releases
from tuner.tables import Decision, ReleaseState

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


def roles(database: Database) -> tuple[int, int | None, int]:
    with database.read() as session:
        row = deployments.get_deployment(session, "assistant")
        return row.production, row.previous, row.generation


def test_a_move_is_made_once_whoever_tries_at_once(database: Database) -> None:
    make_candidates(database)

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
    make_candidates(database)
    with database.write() as session:
        row = deployments.get_deployment(session, "assistant")
        row.canary, row.canary_percent, row.canary_id = 2, 10.0, "canary_1"
    with database.write() as session:
        row = moves.move_production(session, "assistant", 1, expected_generation=0)
        assert (row.canary, row.canary_percent, row.canary_id) == (None, 0.0, None)


def test_what_is_production_already_is_not_moved(database: Database) -> None:
    make_candidates(database)
    with database.write() as session, pytest.raises(Conflict) as refused:
        moves.move_production(session, "assistant", 0, expected_generation=0)
    assert refused.value.code == "already_production"
    assert roles(database) == (0, None, 0)


def test_a_release_put_away_meanwhile_does_not_become_production(database: Database) -> None:
    make_candidates(database)
    with database.write() as session:
        releases.discard(session, "assistant@1", reason="typo")
    with pytest.raises(Conflict, match="is discarded"), database.write() as session:
        moves.move_production(session, "assistant", 1, expected_generation=0)
    assert roles(database) == (0, None, 0)


def test_rollback_restores_the_previous_release_and_can_be_undone(database: Database) -> None:
    make_candidates(database)
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
