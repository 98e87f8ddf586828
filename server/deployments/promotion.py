"""The effects of promote and rollback: engines first, then one row, then the flip, then the drain.

Owns: the order of those steps and what is written to the audit log. Does not own: who may be
promoted (`tuner/moves.py`) or how engines are prepared (`engines/conductor.py`). Covered: the
gateway killed between any two steps (the row is the truth, engines follow it), two moves at once,
an adapter that an engine does not really serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feedback.db import now
from feedback.errors import Conflict, NotFound
from server.access.visibility import append_audit_of
from server.chat.directory import load_release
from server.chat.routing import ReleaseView
from server.engines.loading import Unfit
from server.engines.proof import Outcome, Proof
from server.gateway import Gateway
from tuner import deployments, moves, releases
from tuner.adapter_checks import check_adapter
from tuner.adapters import AdapterRefused
from tuner.tables import Deployment, ReleaseState

logger = logging.getLogger(__name__)

_STATE_OF_OUTCOME = {
    Outcome.NO_EFFECT: ReleaseState.FAILED,
    Outcome.NOT_ACTIVE: ReleaseState.FAILED,
    Outcome.WRONG_WEIGHTS: ReleaseState.FAILED,
}


@dataclass(frozen=True, slots=True)
class Move:
    """Who moves a release, and why."""

    actor: str
    key_id: str | None = None
    note: str | None = None
    force: bool = False
    by_machine: bool = False
    expected_generation: int | None = None


async def promote(gateway: Gateway, deployment: str, release: str, move: Move) -> Deployment:
    """Make `release` production: check, load, prove on every engine, compare-and-set, flip, drain.

    Raises Conflict or BadRequest where the rules forbid it, NotReady where no engine can take it;
    nothing has changed then. Answers that run end on the release they began with.
    """
    async with gateway.move_lock(deployment):
        generation, view = await asyncio.to_thread(_check, gateway, deployment, release, move)
        await asyncio.to_thread(_check_adapter, gateway, view)
        with gateway.conductor.keep(view):
            proofs = await _prepare(gateway, view, move)
            row = await asyncio.to_thread(
                _commit_promotion, gateway, deployment, view, generation, move, proofs
            )
            await _flip(gateway)
    logger.info(
        "Release promoted",
        extra={"action": "release_promoted", "release": release, "generation": row.generation},
    )
    gateway.in_background(_drain(gateway))
    return row


async def rollback(gateway: Gateway, deployment: str, move: Move) -> Deployment:
    """Swap production and previous. Loads nothing: the previous release has stayed loaded."""
    async with gateway.move_lock(deployment):
        row = await asyncio.to_thread(_commit_rollback, gateway, deployment, move)
        await _flip(gateway)
    logger.info(
        "Release rolled back",
        extra={
            "action": "release_rolled_back",
            "deployment": deployment,
            "generation": row.generation,
        },
    )
    gateway.in_background(_drain(gateway))
    return row


async def _drain(gateway: Gateway) -> None:
    """Unload what has lost its role, once no other gateway sends it requests any more."""
    if not gateway.database.is_sqlite:
        await asyncio.sleep(2 * gateway.settings.gateway.refresh_seconds)
    await gateway.conductor.trim()


async def _flip(gateway: Gateway) -> None:
    """Answer by the new row. It is committed: where it cannot be read now, it is a moment later."""
    try:
        await gateway.directory.refresh()
    except Exception:
        logger.exception("Move not seen yet", extra={"action": "directory_not_refreshed"})


def _check(gateway: Gateway, deployment: str, name: str, move: Move) -> tuple[int, ReleaseView]:
    with gateway.database.read() as session:
        row = deployments.get_deployment(session, deployment)
        release = releases.find_release(session, name)
        if release is None:
            raise NotFound(
                f"no release {name!r}; the list of releases names those that exist", param="release"
            )
        if move.expected_generation is not None and move.expected_generation != row.generation:
            raise Conflict(
                f"{deployment!r} is at generation {row.generation}, "
                f"expected {move.expected_generation}: somebody moved it meanwhile; "
                "look at it and try again",
                code="generation_conflict",
            )
        moves.check_promotable(
            session, row, release, by_machine=move.by_machine, note=move.note, force=move.force
        )
        view = load_release(session, name)
        assert view is not None
        return row.generation, view


def _check_adapter(gateway: Gateway, release: ReleaseView) -> None:
    """The stored files once more, whatever was checked before: bytes rot and disks are edited."""
    if release.adapter_hash is None:
        return
    base = gateway.base
    try:
        gateway.store.verify(release.adapter_hash)
        check_adapter(
            gateway.store.path(release.adapter_hash),
            base_name=base.name,
            base_revision=base.revision,
            max_rank=gateway.settings.engine.max_lora_rank,
            target_modules={name.rpartition(".")[2] for name in base.linear_modules} or None,
            shapes=base.linear_modules or None,
        )
    except AdapterRefused as error:
        raise Conflict(f"{release.name}: {error.message}", code=error.code) from None
    except OSError as error:
        raise Conflict(
            f"{release.name}: its adapter cannot be read ({error})", code="adapter_missing"
        ) from None


async def _prepare(gateway: Gateway, release: ReleaseView, move: Move) -> Mapping[str, Proof]:
    try:
        return await gateway.conductor.prepare(release)
    except Unfit as error:
        outcome = error.proof.outcome if error.proof is not None else None
        if outcome is Outcome.UNPROVEN:
            return await _accept(gateway, release, move, error)
        if outcome in _STATE_OF_OUTCOME:
            await asyncio.to_thread(_mark_failed, gateway, release.name, error.message)
        raise


async def _accept(
    gateway: Gateway, release: ReleaseView, move: Move, error: Unfit
) -> Mapping[str, Proof]:
    """Noise hides the adapter's effect: a person's note accepts that, a machine cannot.

    The acceptance holds for engines of the same kind, later restores included.
    """
    if move.by_machine or not (move.note and move.note.strip()):
        await asyncio.to_thread(_mark_unproven, gateway, release.name, error.message)
        raise Conflict(
            f"{error.message}; a person may accept that by promoting with a note", code="unproven"
        ) from None
    proof = error.proof
    assert proof is not None
    acceptance = {
        "by": move.actor,
        "note": move.note,
        "at": now().isoformat(),
        **gateway.chooser.picture.traits,
        "proof": proof.as_details(),
    }
    await asyncio.to_thread(_mark_unproven, gateway, release.name, error.message, acceptance)
    accepted = await asyncio.to_thread(_load, gateway, release.name)
    return await gateway.conductor.prepare(accepted)


def _load(gateway: Gateway, name: str) -> ReleaseView:
    with gateway.database.read() as session:
        view = load_release(session, name)
        assert view is not None
        return view


def _mark_failed(gateway: Gateway, name: str, reason: str) -> None:
    with gateway.database.write() as session:
        releases.mark_failed(session, name, reason)
        append_audit_of(session, "gateway", None, "release_failed", name, {"reason": reason})


def _mark_unproven(
    gateway: Gateway, name: str, reason: str, acceptance: dict[str, Any] | None = None
) -> None:
    with gateway.database.write() as session:
        releases.set_unproven(session, name, reason)
        if acceptance is not None:
            releases.accept_unproven(session, name, acceptance)


def _commit_promotion(
    gateway: Gateway,
    deployment: str,
    release: ReleaseView,
    generation: int,
    move: Move,
    proofs: Mapping[str, Proof],
) -> Deployment:
    with gateway.database.write() as session:
        before = deployments.get_deployment(session, deployment).production
        row = moves.move_production(
            session, deployment, release.number, expected_generation=generation
        )
        evaluation = releases.newest_evaluation(session, release.name)
        details: dict[str, Any] = {
            "deployment": deployment,
            "from": f"{deployment}@{before}",
            "generation": row.generation,
            "note": move.note,
            "force": move.force,
            "evaluation": None if evaluation is None else evaluation.id,
            "decision": None if evaluation is None else evaluation.decision,
            "adapter_hash": release.adapter_hash,
            "proofs": {engine: proof.as_details() for engine, proof in proofs.items()},
        }
        append_audit_of(session, move.actor, move.key_id, "promote", release.name, details)
        return row


def _commit_rollback(gateway: Gateway, deployment: str, move: Move) -> Deployment:
    with gateway.database.write() as session:
        before = deployments.get_deployment(session, deployment)
        expected = (
            before.generation if move.expected_generation is None else move.expected_generation
        )
        was = before.production
        row = moves.swap_back(session, deployment, expected_generation=expected)
        details: dict[str, Any] = {
            "deployment": deployment,
            "from": f"{deployment}@{was}",
            "generation": row.generation,
            "note": move.note,
        }
        append_audit_of(
            session, move.actor, move.key_id, "rollback", f"{deployment}@{row.production}", details
        )
        return row
