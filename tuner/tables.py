"""Tables of the loop: jobs, adapters, releases, deployments, evaluations."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from feedback.db import Base, CanonicalJson, UtcDateTime, now


class JobKind(StrEnum):
    FREEZE = "freeze"  #: judged answers become a data set
    TUNE = "tune"  #: a data set becomes an adapter and a candidate release
    EVALUATE = "evaluate"  #: a candidate is compared with production
    IMPORT = "import"
    ERASE = "erase"
    EXPORT = "export"


class JobStatus(StrEnum):
    QUEUED = "queued"  #: waits for a worker
    RUNNING = "running"  #: leased; the beat counter moves
    SUCCEEDED = "succeeded"  #: its result is recorded
    FAILED = "failed"  #: ended with a reason; not tried again
    CANCELLED = "cancelled"  #: ended because somebody asked for it
    PAUSED = "paused"  #: put aside by a person; goes on from its checkpoint when it is resumed


class ReleaseState(StrEnum):
    """Kept apart from roles: production, previous and canary are read from the deployment's row."""

    CANDIDATE = "candidate"  #: may be evaluated and promoted
    DISCARDED = "discarded"  #: put away by a person
    FAILED = "failed"  #: an engine showed that its adapter does nothing or the wrong thing
    UNPROVEN = "unproven"  #: noise hides the adapter's effect; a person may accept it


class Decision(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


class Deployment(Base):
    """A public model name.

    Its roles point at releases; every move is a compare-and-set on `generation`.
    """

    __tablename__ = "deployments"

    name: Mapped[str] = mapped_column(primary_key=True)
    base_model: Mapped[str]
    production: Mapped[int] = mapped_column(default=0)  #: a release's number
    previous: Mapped[int | None]
    #: the last move was a rollback: `previous` was undone
    rolled_back: Mapped[bool] = mapped_column(default=False)
    canary: Mapped[int | None]
    canary_percent: Mapped[float] = mapped_column(default=0.0)
    canary_id: Mapped[str | None]
    generation: Mapped[int] = mapped_column(default=0)
    policies: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)
    #: attached files and data sets
    sources: Mapped[list[str]] = mapped_column(CanonicalJson, default=list)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class DeploymentAlias(Base):
    """Another name for a deployment."""

    __tablename__ = "deployment_aliases"

    alias: Mapped[str] = mapped_column(primary_key=True)
    deployment: Mapped[str] = mapped_column(
        ForeignKey("deployments.name", ondelete="CASCADE"), index=True
    )


class Adapter(Base):
    """LoRA weights, named by their content."""

    __tablename__ = "adapters"

    id: Mapped[str] = mapped_column(primary_key=True)  #: ad_…
    content_hash: Mapped[str] = mapped_column(unique=True)
    r: Mapped[int]
    lora_alpha: Mapped[int]
    target_modules: Mapped[list[str]] = mapped_column(CanonicalJson)
    base_model: Mapped[str]
    base_revision: Mapped[str]
    template_hash: Mapped[str | None]
    bytes: Mapped[int]
    origin: Mapped[str] = mapped_column(default="tune")  #: tune or import
    job_id: Mapped[str | None]
    #: the trainer's figures on fixed prompts, which every engine must come near to
    probe: Mapped[dict[str, Any] | None] = mapped_column(CanonicalJson)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Release(Base):
    """A version that can answer. Immutable but for its state."""

    __tablename__ = "releases"
    __table_args__ = (UniqueConstraint("deployment", "number"),)

    name: Mapped[str] = mapped_column(primary_key=True)  #: assistant@7
    deployment: Mapped[str] = mapped_column(ForeignKey("deployments.name"))
    number: Mapped[int]
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"), index=True)
    #: what the engine calls it: the base's name, or `<deployment>-<n>-<hash8>`
    engine_name: Mapped[str]
    base_model: Mapped[str]
    base_revision: Mapped[str]
    template_hash: Mapped[str | None]
    system_prompt: Mapped[str | None] = mapped_column(Text)
    sampling: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)
    state: Mapped[str] = mapped_column(default=ReleaseState.CANDIDATE)
    state_reason: Mapped[str | None] = mapped_column(Text)
    #: of an unproven one, by a person
    acceptance: Mapped[dict[str, Any] | None] = mapped_column(CanonicalJson)
    job_id: Mapped[str | None]
    #: what the person who tuned it calls it; no part of its name
    suffix: Mapped[str | None]
    dataset_id: Mapped[str | None]
    sources_left_out: Mapped[list[str]] = mapped_column(CanonicalJson, default=list)
    created_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Job(Base):
    """Work in the background, under a lease.

    `attempt` fences every write of a worker, `beat` shows that it lives.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_status_id", "status", "id"),
        Index("ix_jobs_kind_id", "kind", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)  #: ftjob-… for tuning, job_… otherwise
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(default=JobStatus.QUEUED)
    method: Mapped[str | None]
    deployment: Mapped[str | None] = mapped_column(index=True)
    spec: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)  #: what was asked for
    result: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)  #: what came of it
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    worker: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(default=0)
    beat: Mapped[int] = mapped_column(default=0)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    person_id: Mapped[str | None] = mapped_column(index=True)
    created_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class JobEvent(Base):
    """Something that happened in a job, in order."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_seq", "job_id", "seq", unique=True),)

    id: Mapped[str] = mapped_column(primary_key=True)  #: ftevt-…
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    seq: Mapped[int]
    attempt: Mapped[int]
    level: Mapped[str] = mapped_column(default="info")  #: info, warn or error
    #: message, metrics, validation or checkpoint
    type: Mapped[str] = mapped_column(default="message")
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Evaluation(Base):
    """Comparison of a release with what was in production."""

    __tablename__ = "evaluations"

    id: Mapped[str] = mapped_column(primary_key=True)  #: eval_…
    deployment: Mapped[str] = mapped_column(index=True)
    release: Mapped[str] = mapped_column(ForeignKey("releases.name"), index=True)
    baseline: Mapped[str] = mapped_column(ForeignKey("releases.name"))
    dataset_id: Mapped[str | None]
    job_id: Mapped[str | None]
    decision: Mapped[str | None]  #: None until it has decided
    reasons: Mapped[list[str]] = mapped_column(CanonicalJson, default=list)
    checks: Mapped[list[dict[str, Any]]] = mapped_column(CanonicalJson, default=list)
    metrics: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)
    error: Mapped[str | None] = mapped_column(Text)
    created_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
