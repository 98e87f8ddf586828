"""Tuning jobs, their events and checkpoints, in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from server.views.objects import one_of, unix
from tuner.jobs import ENDED
from tuner.methods import AUTO, Method, list_shown
from tuner.tables import Job, JobEvent, JobStatus, Release


class MethodUsed(TypedDict):
    """The method, and its hyperparameters under its own name."""

    type: Annotated[str, one_of(Method)]
    supervised: NotRequired[dict[str, Any]]
    dpo: NotRequired[dict[str, Any]]
    kto: NotRequired[dict[str, Any]]
    combined: NotRequired[dict[str, Any]]


class TuningError(TypedDict):
    code: str | None
    message: str | None
    param: str | None


class TuningJob(TypedDict):
    """OpenAI's `fine_tuning.job`."""

    id: str
    object: Literal["fine_tuning.job"]
    model: str | None
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: Annotated[str, one_of(JobStatus)]
    training_file: str | None
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: MethodUsed
    trained_tokens: int | None
    error: TuningError | None
    user_provided_suffix: str | None
    seed: int
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None


class TuningEvent(TypedDict):
    """OpenAI's `fine_tuning.job.event`."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Annotated[str, Field(json_schema_extra={"enum": ["info", "warn", "error"]})]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(TypedDict):
    """Figures of a step, as far as they were told; OpenAI's other ones are not measured."""

    step: int | None
    train_loss: float | None
    full_valid_loss: float | None


class TuningCheckpoint(TypedDict):
    """OpenAI's `fine_tuning.job.checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: None
    fine_tuning_job_id: str
    step_number: int | None
    metrics: CheckpointMetrics


def view_tuning_job(session: Session, row: Job) -> TuningJob:
    """A tuning job; what it was not told shows as "auto"."""
    given = row.spec.get("hyperparameters", {})
    method = Method(row.method or Method.SUPERVISED)
    shown = {name: given.get(name, AUTO) for name in list_shown(method)}
    used = {"type": method, str(method): {"hyperparameters": {**shown, **given}}}
    ended = row.status in ENDED
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "model": row.deployment,
        "created_at": unix(row.created_at),
        "finished_at": unix(row.finished_at),
        "fine_tuned_model": _release_of(session, row),
        "organization_id": "burnish",
        "result_files": [],
        "status": row.status,
        "training_file": row.spec.get("training_file"),
        "validation_file": row.spec.get("validation_file"),
        "hyperparameters": {name: given.get(name, AUTO) for name in list_shown()},
        "method": cast(MethodUsed, used),
        "trained_tokens": row.result.get("trained_tokens") if ended else None,
        "error": _error(row),
        "user_provided_suffix": row.spec.get("suffix"),
        "seed": row.spec.get("seed", 0),
        "estimated_finish": None,
        "integrations": [],
        "metadata": row.spec.get("metadata"),
    }


def view_event(row: JobEvent) -> TuningEvent:
    """Something that happened in a job."""
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "created_at": unix(row.created_at),
        "level": row.level,
        "message": row.message,
        # OpenAI has these two.
        "type": "metrics" if row.type in ("metrics", "validation") else "message",
        "data": row.data,
    }


def view_checkpoint(row: JobEvent, figures: dict[str, Any]) -> TuningCheckpoint:
    """A step at which the run was saved, with the `figures` that were told of it."""
    step = row.data.get("step")
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": unix(row.created_at),
        "fine_tuned_model_checkpoint": None,
        "fine_tuning_job_id": row.job_id,
        "step_number": step,
        "metrics": {
            "step": step,
            "train_loss": figures.get("loss"),
            "full_valid_loss": figures.get("full_valid_loss"),
        },
    }


def _error(row: Job) -> TuningError | None:
    if row.status != JobStatus.FAILED:
        return None
    return {"code": row.error_code, "message": row.error_message, "param": None}


def _release_of(session: Session, row: Job) -> str | None:
    """The release that the job made, None unless it succeeded.

    It is the first one that names the job; later ones have its adapter with another prompt.
    """
    if row.status != JobStatus.SUCCEEDED:
        return None
    query = select(Release.name).where(
        Release.deployment == row.deployment, Release.job_id == row.id
    )
    return session.scalar(query.order_by(Release.number).limit(1))
