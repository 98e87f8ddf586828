"""Promote and rollback over real engines' surface: answers are signed by the weights."""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

import pytest
from sqlalchemy import select

from feedback import audit
from feedback.errors import AppError, Conflict
from feedback.tables import Answer
from server.deployments import promotion
from server.deployments.promotion import Move
from tests.fake_engine import BASE, FakeEngine, Faults
from tests.gateway_fixtures import PROBE, RunningGateway
from tuner import deployments, moves, releases
from tuner.tables import Adapter, Release, ReleaseState

CHAT = "/v1/chat/completions"


def ask(gateway: RunningGateway, key: str, content: str = "hi", **more: Any) -> tuple[str, str]:
    """The answer's release, and the signature of the weights that made it."""
    body = {"model": "assistant", "messages": [{"role": "user", "content": content}], **more}
    reply = gateway.client(key).post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    return answer["model"], answer["choices"][0]["message"]["content"].split()[0]


def state_of(gateway: RunningGateway, name: str) -> Release:
    with gateway.database.read() as session:
        return session.get_one(Release, name)


def test_a_promoted_release_answers_at_once_and_rollback_restores_the_one_before_without_a_load(
    running_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    key = running_gateway.key("anna")
    first, second = running_gateway.candidate(1), running_gateway.candidate(2)
    assert ask(running_gateway, key) == ("assistant@0", BASE)
    running_gateway.promote(first.name, force=False)
    assert ask(running_gateway, key) == (first.name, first.signature)
    row = running_gateway.promote(second.name)
    assert (row.production, row.previous, row.generation) == (2, 1, 2)
    assert ask(running_gateway, key) == (second.name, second.signature)
    gateway_engine.faults = Faults(load_fails=True)
    loads = gateway_engine.slots.loads
    row = running_gateway.rollback()
    assert (row.production, row.previous, row.generation) == (1, 2, 3)
    assert ask(running_gateway, key) == (first.name, first.signature)
    assert gateway_engine.slots.loads == loads


def test_conversations_stay_through_a_promotion_and_leave_what_was_rolled_back(
    sqlite_gateway: RunningGateway,
) -> None:
    client = sqlite_gateway.client(sqlite_gateway.key("anna"))
    turns: list[dict[str, Any]] = []

    def say(content: str) -> str:
        turns.append({"role": "user", "content": content})
        answer = client.post(CHAT, json={"model": "assistant", "messages": turns}).json()
        turns.append(answer["choices"][0]["message"])
        return str(answer["model"])

    first, second = sqlite_gateway.candidate(1), sqlite_gateway.candidate(2)
    sqlite_gateway.promote(first.name)
    assert say("one") == first.name
    sqlite_gateway.promote(second.name)
    assert say("two") == first.name  # promoted over: it stays
    turns[:] = []
    assert say("afresh") == second.name
    kept = list(turns)
    sqlite_gateway.rollback()
    assert say("go on") == first.name  # rolled back: it leaves
    turns[:] = [*kept[:-1], kept[-1], {"role": "user", "content": "go on"}]
    again = client.post(CHAT, json={"model": "assistant", "messages": turns}).json()
    assert again["model"] == first.name
    with sqlite_gateway.database.read() as session:
        assert session.get_one(Answer, again["id"]).regenerates_id is not None


def test_a_regeneration_is_routed_anew_in_mid_conversation(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client(sqlite_gateway.key("anna"))
    hi = {"role": "user", "content": "hi"}
    answer = client.post(CHAT, json={"model": "assistant", "messages": [hi]}).json()
    turns = [hi, answer["choices"][0]["message"], {"role": "user", "content": "more"}]
    body = {"model": "assistant", "messages": turns}
    first = sqlite_gateway.candidate(1)
    sqlite_gateway.promote(first.name)
    assert client.post(CHAT, json=body).json()["model"] == "assistant@0"
    assert client.post(CHAT, json=body).json()["model"] == first.name


@pytest.mark.parametrize(
    ("faults", "code", "state"),
    [
        (Faults(load_does_nothing=True), "not_active", ReleaseState.FAILED),
        (Faults(load_wrong_weights=True), "wrong_weights", ReleaseState.FAILED),
        (Faults(load_fails=True), "load_refused", ReleaseState.CANDIDATE),
    ],
)
def test_an_adapter_that_the_engine_does_not_apply_is_refused_even_by_force(
    sqlite_gateway: RunningGateway,
    gateway_engine: FakeEngine,
    faults: Faults,
    code: str,
    state: ReleaseState,
) -> None:
    candidate = sqlite_gateway.candidate(1)
    gateway_engine.faults = faults
    with pytest.raises(Conflict) as refused:
        sqlite_gateway.promote(candidate.name)
    assert refused.value.code == code
    assert state_of(sqlite_gateway, candidate.name).state == state
    assert candidate.engine_name not in gateway_engine.adapters
    assert ask(sqlite_gateway, sqlite_gateway.key("anna")) == ("assistant@0", BASE)
    if state is ReleaseState.FAILED:
        gateway_engine.faults = Faults()
        with pytest.raises(Conflict, match="failed"):
            sqlite_gateway.promote(candidate.name)


def test_an_adapter_without_effect_is_refused(sqlite_gateway: RunningGateway) -> None:
    candidate = sqlite_gateway.candidate(1)
    with sqlite_gateway.database.write() as session:
        adapter = session.scalars(select(Adapter)).one()
        assert adapter.probe is not None
        adapter.probe = {**adapter.probe, "adapter": adapter.probe["base"]}
    with pytest.raises(Conflict) as refused:
        sqlite_gateway.promote(candidate.name)
    assert refused.value.code == "no_effect"


def test_what_noise_hides_takes_a_note_and_no_machine_and_holds_for_such_engines_alone(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    candidate = sqlite_gateway.candidate(1)
    gateway_engine.faults = Faults(logprob_noise=2.0)
    for move in ({"by_machine": True, "force": False}, {"note": None, "force": False}):
        with pytest.raises(Conflict) as refused:
            sqlite_gateway.promote(candidate.name, **move)
        assert refused.value.code == "unproven"
    assert state_of(sqlite_gateway, candidate.name).state == ReleaseState.UNPROVEN
    sqlite_gateway.promote(candidate.name, note="heard it speak", force=False)
    acceptance = state_of(sqlite_gateway, candidate.name).acceptance
    assert acceptance is not None
    assert acceptance["note"] == "heard it speak"
    key = sqlite_gateway.key("anna")
    assert ask(sqlite_gateway, key) == (candidate.name, candidate.signature)
    gateway_engine.restart()
    sqlite_gateway.reconcile()
    assert ask(sqlite_gateway, key) == (candidate.name, candidate.signature)
    sqlite_gateway.gateway.conductor.loader.traits["dtype"] = "bfloat16"
    gateway_engine.restart()
    sqlite_gateway.reconcile()
    assert not sqlite_gateway.gateway.chooser.picture.is_ready


def test_a_stored_adapter_that_was_altered_or_lost_is_refused(
    sqlite_gateway: RunningGateway,
) -> None:
    altered, lost = sqlite_gateway.candidate(1), sqlite_gateway.candidate(2)
    store = sqlite_gateway.gateway.store
    weights = store.path(altered.content_hash) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    shutil.rmtree(store.path(lost.content_hash))
    for candidate, code in ((altered, "damaged"), (lost, "missing_file")):
        with pytest.raises(Conflict) as refused:
            sqlite_gateway.promote(candidate.name)
        assert refused.value.code == code


def test_a_restarted_engine_gets_no_traffic_before_it_is_restored_and_proven(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    candidate = sqlite_gateway.candidate(1)
    sqlite_gateway.promote(candidate.name)
    key = sqlite_gateway.key("anna")
    gateway_engine.faults = Faults(load_does_nothing=True)
    gateway_engine.restart()
    sqlite_gateway.reconcile()
    client = sqlite_gateway.client(key)
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    refused = client.post(CHAT, json=body)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_not_ready"
    assert client.get("/readyz").status_code == 503
    gateway_engine.faults = Faults()
    gateway_engine.restart()
    sqlite_gateway.reconcile()
    assert ask(sqlite_gateway, key) == (candidate.name, candidate.signature)


def test_an_engine_that_restarted_unseen_answers_nothing_wrong(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    candidate = sqlite_gateway.candidate(1)
    sqlite_gateway.promote(candidate.name)
    gateway_engine.restart()
    body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
    reply = sqlite_gateway.client(sqlite_gateway.key("anna")).post(CHAT, json=body)
    if reply.status_code == 200:  # the reconciler was there first
        assert reply.json()["choices"][0]["message"]["content"].startswith(candidate.signature)
    else:
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] in ("not_loaded", "engine_not_ready")


def test_of_two_moves_at_once_one_wins_and_the_other_is_told(
    running_gateway: RunningGateway,
) -> None:
    first, second = running_gateway.candidate(1), running_gateway.candidate(2)

    async def both() -> list[Any]:
        moves = [
            promotion.promote(
                running_gateway.gateway,
                "assistant",
                candidate.name,
                Move(actor="admin", note="n", force=True, expected_generation=0),
            )
            for candidate in (first, second)
        ]
        return await asyncio.gather(*moves, return_exceptions=True)

    done = running_gateway.run(both())
    errors = [result for result in done if isinstance(result, AppError)]
    assert [error.code for error in errors] == ["generation_conflict"]
    with running_gateway.database.read() as session:
        row = deployments.get_deployment(session, "assistant")
        assert (row.generation, row.previous) == (1, 0)


def test_a_move_in_another_gateway_loses_no_generation(sqlite_gateway: RunningGateway) -> None:
    """The row is compared when it is set: a move that was prepared meanwhile is refused."""
    first, second = sqlite_gateway.candidate(1), sqlite_gateway.candidate(2)
    conductor = sqlite_gateway.gateway.conductor
    prepare = conductor.prepare

    async def prepare_while_another_moves(*args: Any, **more: Any) -> Any:
        with sqlite_gateway.database.write() as session:
            moves.move_production(session, "assistant", 2, expected_generation=0)
        return await prepare(*args, **more)

    conductor.prepare = prepare_while_another_moves  # type: ignore[method-assign] - this one alone
    with pytest.raises(Conflict) as refused:
        sqlite_gateway.promote(first.name)
    assert refused.value.code == "generation_conflict"
    conductor.prepare = prepare  # type: ignore[method-assign] - this one alone
    sqlite_gateway.refresh()
    sqlite_gateway.reconcile()
    assert ask(sqlite_gateway, sqlite_gateway.key("anna")) == (second.name, second.signature)


def test_nothing_to_roll_back_to_is_a_conflict(sqlite_gateway: RunningGateway) -> None:
    with pytest.raises(Conflict) as refused:
        sqlite_gateway.rollback()
    assert refused.value.code == "nothing_to_roll_back_to"


def test_a_pinned_release_is_loaded_proven_and_known_from_then_on(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    key = sqlite_gateway.key("anna")
    pinned = [sqlite_gateway.candidate(seed) for seed in range(1, 7)]
    for candidate in pinned:  # more than there are slots
        assert ask(sqlite_gateway, key, model=candidate.name) == (
            candidate.name,
            candidate.signature,
        )
    assert len(gateway_engine.adapters) == 4
    sqlite_gateway.refresh()
    known = sqlite_gateway.gateway.directory.snapshot.served
    assert {candidate.name for candidate in pinned} <= known.keys()
    with sqlite_gateway.database.write() as session:
        releases.discard(session, pinned[-1].name)
    sqlite_gateway.refresh()
    body = {"model": pinned[-1].name, "messages": [{"role": "user", "content": "hi"}]}
    assert sqlite_gateway.client(key).post(CHAT, json=body).status_code == 404


def test_a_release_that_is_loaded_and_not_yet_proven_answers_nobody(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    """Whoever asks for it meanwhile waits for the proof, and is told when it fails."""
    candidate = sqlite_gateway.candidate(1)
    gateway_engine.faults = Faults(load_does_nothing=True)
    body = {"model": candidate.name, "messages": [{"role": "user", "content": "hi"}]}
    reply = sqlite_gateway.client(sqlite_gateway.key("anna")).post(CHAT, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "not_active")
    asked = [r.body["model"] for r in gateway_engine.requests if r.path == CHAT]
    assert candidate.engine_name not in asked
    assert [r.body["prompt"] for r in gateway_engine.requests if r.path == "/v1/completions"] == [
        PROBE,
        PROBE,
    ]


def test_a_note_that_is_long_in_the_log_moves_a_release_all_the_same(
    sqlite_gateway: RunningGateway,
) -> None:
    note = "\x01" * 2000
    sqlite_gateway.promote(sqlite_gateway.candidate(1).name, note=note)
    move = Move(actor="admin", note=note)
    sqlite_gateway.run(promotion.rollback(sqlite_gateway.gateway, "assistant", move))
    with sqlite_gateway.database.read() as session:
        newest = audit.list_entries(session, limit=2)[0]
    assert [entry.action for entry in newest] == ["rollback", "promote"]
    assert all(entry.details["note"]["characters"] > len(note) for entry in newest)
