"""Where a release comes from, and what became of an answer: `burnish explain`.

Owns: following the identifiers that every step leaves. Reads only, and shows identifiers, counts,
times and verdicts, never what people wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import distinct, func, or_, select
from sqlalchemy.orm import Session

from feedback.datasets import what_became
from feedback.errors import NotFound
from feedback.tables import (
    Answer,
    AuditEntry,
    Comparison,
    Dataset,
    DatasetRow,
    File,
    Judgement,
    JudgementKind,
)
from tuner.deployments import get_deployment
from tuner.jobs import find_job
from tuner.releases import get_release, role_of
from tuner.tables import Adapter, Evaluation, Job, Release

MOVES = ("promote", "rollback", "canary")

_SPEAKING = (JudgementKind.RATING, JudgementKind.STARS)
"""Kinds whose value is a figure and not a text."""


def explain_release(session: Session, name: str) -> dict[str, Any]:
    """Job, data, evaluations and moves of a release; raises `NotFound`."""
    release = get_release(session, name)
    deployment = get_deployment(session, release.deployment)
    adapter = session.get(Adapter, release.adapter_id) if release.adapter_id else None
    # A release with another prompt has its adapter's job.
    job_id = release.job_id or (adapter.job_id if adapter is not None else None)
    job = find_job(session, job_id) if job_id is not None else None
    files = _list_files(session, job)
    validation_id = job.spec.get("validation_file") if job is not None else None
    validation = session.get(File, validation_id) if validation_id is not None else None
    role = role_of(deployment, release.number)
    return {
        "release": {
            "name": release.name,
            "deployment": release.deployment,
            "role": str(role) if role is not None else None,
            "state": release.state,
            "state_reason": release.state_reason,
            "base_model": release.base_model,
            "base_revision": release.base_revision,
            "template_hash": release.template_hash,
            "engine_name": release.engine_name,
            "has_system_prompt": bool(release.system_prompt),
            "sampling": release.sampling,
            "acceptance": release.acceptance,
            "suffix": release.suffix,
            "created_by": release.created_by,
            "created_at": _time(release.created_at),
        },
        "adapter": None if adapter is None else _explain_adapter(adapter),
        "job": None if job is None else _explain_job(job),
        "dataset": _explain_dataset(session, release.dataset_id),
        "sources": {
            "files": [_explain_file(file) for file in files],
            "validation_file": None if validation is None else _explain_file(validation),
            "left_out": release.sources_left_out,
            "deployment": deployment.sources,
        },
        "evaluations": _list_evaluations(session, release.name),
        "moves": _list_moves(session, release),
    }


def explain_answer(
    session: Session, answer_id: str, *, deployments: Collection[str] | None = None
) -> dict[str, Any]:
    """The release that answered, and what each verdict became; raises `NotFound`.

    Comparisons with answers of other deployments than these are left out; None: all of them stay.
    """
    answer = session.get(Answer, answer_id)
    if answer is None:
        raise NotFound(f"No answer {answer_id!r}; its id is the one that the client received.")
    judgements = session.scalars(
        select(Judgement).where(Judgement.answer_id == answer.id).order_by(Judgement.id)
    )
    compared = (
        select(Comparison)
        .where(or_(Comparison.answer_a == answer.id, Comparison.answer_b == answer.id))
        .order_by(Comparison.id)
    )
    if deployments is not None:
        seen = select(Answer.id).where(Answer.deployment.in_(deployments))
        compared = compared.where(Comparison.answer_a.in_(seen), Comparison.answer_b.in_(seen))
    comparisons = session.scalars(compared)
    return {
        "answer": {
            "id": answer.id,
            "release": answer.release,
            "deployment": answer.deployment,
            "requested_model": answer.requested_model,
            "arm": answer.arm,
            "propensity": answer.propensity,
            "generation": answer.generation,
            "engine": answer.engine,
            "gateway": answer.gateway,
            "kind": answer.kind,
            "status": answer.status,
            "error_code": answer.error_code,
            "stored": answer.stored,
            "trainable": answer.trainable,
            "person_id": answer.person_id,
            "conversation_id": answer.conversation_id,
            "regenerates_id": answer.regenerates_id,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "started_at": _time(answer.started_at),
            "first_token_at": _time(answer.first_token_at),
            "ended_at": _time(answer.ended_at),
        },
        "judgements": [
            {
                "id": judgement.id,
                "kind": judgement.kind,
                "name": judgement.name or None,
                "value": judgement.value if judgement.kind in _SPEAKING else None,
                "withdrawn": judgement.value is None,
                "choice_index": judgement.choice_index,
                "source_type": judgement.source_type,
                "person_id": judgement.person_id,
                "revision": judgement.revision,
                "updated_at": _time(judgement.updated_at),
                **_explain_verdict(session, judgement.id),
            }
            for judgement in judgements
        ],
        "comparisons": [
            {
                "id": comparison.id,
                "completion_ids": [comparison.answer_a, comparison.answer_b],
                "choice_indexes": [comparison.choice_a, comparison.choice_b],
                "preferred": comparison.preferred,
                "withdrawn": comparison.preferred is None,
                "source_type": comparison.source_type,
                "person_id": comparison.person_id,
                "revision": comparison.revision,
                "updated_at": _time(comparison.updated_at),
                **_explain_verdict(session, comparison.id),
            }
            for comparison in comparisons
        ],
    }


def _explain_adapter(adapter: Adapter) -> dict[str, Any]:
    return {
        "id": adapter.id,
        "content_hash": adapter.content_hash,
        "origin": adapter.origin,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "target_modules": adapter.target_modules,
        "base_model": adapter.base_model,
        "base_revision": adapter.base_revision,
        "bytes": adapter.bytes,
        "created_at": _time(adapter.created_at),
    }


def _explain_job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "method": job.method,
        "training_file": job.spec.get("training_file"),
        "validation_file": job.spec.get("validation_file"),
        "hyperparameters": job.spec.get("hyperparameters", {}),
        "seed": job.spec.get("seed"),
        "attempts": job.attempt,
        "metrics": job.result.get("metrics", {}),
        "manifest": job.result.get("manifest"),
        "created_by": job.created_by,
        "created_at": _time(job.created_at),
        "finished_at": _time(job.finished_at),
    }


def _explain_file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "sha256": file.sha256,
        "rows": file.rows,
        "kind": file.kind,
        "dataset_id": file.dataset_id,
    }


def _explain_dataset(session: Session, dataset_id: str | None) -> dict[str, Any] | None:
    dataset = session.get(Dataset, dataset_id) if dataset_id is not None else None
    if dataset is None:
        return None
    people, answers = session.execute(
        select(
            func.count(distinct(DatasetRow.person_id)), func.count(distinct(DatasetRow.answer_id))
        ).where(DatasetRow.dataset_id == dataset.id)
    ).one()
    return {
        "id": dataset.id,
        "status": dataset.status,
        "counts": dataset.counts,
        "dropped": dataset.dropped,
        "content_hash": dataset.content_hash,
        "policy_hash": dataset.policy_hash,
        "people": people,
        "answers": answers,
        "created_by": dataset.created_by,
        "ready_at": _time(dataset.ready_at),
    }


def _list_files(session: Session, job: Job | None) -> list[File]:
    """The files that the job trained on and that are still there, in its order."""
    ids = job.spec.get("files", []) if job is not None else []
    return [file for file_id in ids if (file := session.get(File, file_id)) is not None]


def _list_evaluations(session: Session, release: str) -> list[dict[str, Any]]:
    rows = session.scalars(
        select(Evaluation)
        .where(Evaluation.release == release)
        .order_by(Evaluation.created_at, Evaluation.id)
    )
    return [
        {
            "id": row.id,
            "baseline": row.baseline,
            "dataset_id": row.dataset_id,
            "decision": row.decision,
            "reasons": row.reasons,
            "error": row.error,
            "job_id": row.job_id,
            "created_at": _time(row.created_at),
            "finished_at": _time(row.finished_at),
        }
        for row in rows
    ]


def _list_moves(session: Session, release: Release) -> list[dict[str, Any]]:
    """Moves to this release, oldest first; who moved, when, and why."""
    rows = session.scalars(
        select(AuditEntry)
        .where(AuditEntry.subject == release.name, AuditEntry.action.in_(MOVES))
        .order_by(AuditEntry.seq)
    )
    return [
        {
            "action": row.action,
            "at": _time(row.at),
            "actor": row.actor,
            "from": row.details.get("from"),
            "generation": row.details.get("generation"),
            "note": row.details.get("note"),
            "force": bool(row.details.get("force")),
            "evaluation": row.details.get("evaluation"),
            "decision": row.details.get("decision"),
        }
        for row in rows
    ]


def _explain_verdict(session: Session, verdict_id: str) -> dict[str, Any]:
    """What a verdict became, up to the releases that were trained on it."""
    became = what_became(session, verdict_id)
    trained = {(row["id"], row["kind"]) for row in became["datasets"] if row["side"] == "train"}
    return {**became, "releases": _list_trained(session, trained)}


def _list_trained(session: Session, parts: Iterable[tuple[str, str]]) -> list[str]:
    """Releases whose adapter learned from one of these (data set, kind) parts.

    A job on a data set takes the kinds that its method learns from; a release with another prompt
    shares the adapter.
    """
    wanted = set(parts)
    releases = session.scalars(
        select(Release).where(
            Release.dataset_id.in_({dataset_id for dataset_id, _ in wanted}),
            Release.job_id.is_not(None),
        )
    ).all()
    adapters = {
        release.adapter_id
        for release in releases
        if release.adapter_id is not None
        and any(
            (file.dataset_id, file.kind) in wanted
            for file in _list_files(session, find_job(session, str(release.job_id)))
        )
    }
    named = select(Release.name).where(Release.adapter_id.in_(adapters))
    return list(session.scalars(named.order_by(Release.deployment, Release.number)))


def _time(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None
