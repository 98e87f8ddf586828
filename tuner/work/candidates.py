"""From a trainer's output to a candidate release: what is checked, and what is written.

Owns: the files that a tuning job may train on, and the rows of a candidate. Does not own the job's
course (`tune.py`) or the child (`trainer.py`). Functions that take a session never commit: the
caller writes a candidate and the end of its job in one transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from feedback.errors import BadRequest
from feedback.tables import Dataset, File
from tuner.adapters import AdapterFacts, adapter_id
from tuner.base_models import BaseModel
from tuner.deployments import get_deployment
from tuner.evaluation.evaluations import create_evaluation
from tuner.jobs import JobFailed
from tuner.releases import create_release, get_release, production_of
from tuner.tables import Adapter, Evaluation, Job, Release
from tuner.tuning import list_sources_left_out


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a tuning job made."""

    release: Release
    adapter: Adapter
    evaluation: Evaluation | None
    not_evaluated: str | None  #: why there is no evaluation


def get_training_files(session: Session, job: Job) -> list[File]:
    """The job's files in its order; raises `JobFailed` when one was deleted meanwhile."""
    files = []
    for file_id in job.spec["files"]:
        file = session.get(File, file_id)
        if file is None:
            raise JobFailed(
                "training_data_gone",
                f"{file_id} was deleted after the job was created; make a new data set and a new "
                "job.",
            )
        files.append(file)
    return files


def get_validation_file(session: Session, job: Job) -> File | None:
    """The file that the job validates with, or None; raises `JobFailed` when it was deleted."""
    file_id = job.spec.get("validation_file")
    if file_id is None:
        return None
    file = session.get(File, file_id)
    if file is None:
        raise JobFailed(
            "validation_data_gone",
            f"{file_id} was deleted after the job was created; create the job again with another "
            "validation_file.",
        )
    return file


def check_base(session: Session, job: Job, base: BaseModel) -> None:
    """Raise `JobFailed` unless the job's deployment is served by `base` with this template."""
    deployment = get_deployment(session, str(job.deployment))
    origin = get_release(session, f"{deployment.name}@0")
    found, expected = (base.name, base.revision), (origin.base_model, origin.base_revision)
    if found != expected:
        raise JobFailed(
            "wrong_base",
            f"this worker trains on {found[0]!r} at {found[1]!r}, but {deployment.name!r} serves "
            f"{expected[0]!r} at {expected[1]!r}; give both the same model.",
        )
    if origin.template_hash not in (None, base.template_hash):
        raise JobFailed(
            "wrong_template",
            f"the chat template of {base.name!r} has changed since {deployment.name!r} was made; "
            "what is trained would not be what is served.",
        )


def find_data_hash(session: Session, job: Job, files: Sequence[File]) -> str | None:
    """The hash of what is trained on: the data set's, or the file's where it is one file."""
    if job.spec["training_file"] == job.spec["dataset_id"]:
        dataset = session.get(Dataset, job.spec["dataset_id"])
        return dataset.content_hash if dataset is not None else None
    return files[0].sha256


def verify_files(files: Iterable[File], data: Path, *, check: Callable[[], None]) -> None:
    """Raise `JobFailed` unless each file below `data` is there and has its recorded hash.

    Its codes say "training data" of a validation file too: both are what a run is made of.
    """
    for file in files:
        check()
        try:
            with (data / file.path).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            raise JobFailed(
                "training_data_missing",
                f"{file.id} ({file.filename}) is not on disk at {file.path!r}; restore it, or make "
                "a new data set.",
            ) from None
        if found != file.sha256:
            raise JobFailed(
                "training_data_damaged",
                f"{file.id} ({file.filename}) has changed on disk: found sha256 {found}, recorded "
                f"is {file.sha256}; restore it, or make a new data set.",
            )


def create_candidate(
    session: Session,
    job: Job,
    facts: AdapterFacts,
    base: BaseModel,
    *,
    probe: Mapping[str, Any] | None,
) -> Candidate:
    """Write the rows of a stored adapter: itself, a candidate release, its queued evaluation.

    The release takes production's system prompt and sampling. Raises `JobFailed` when the data was
    deleted meanwhile, `Conflict` for an adapter of another base.
    """
    get_training_files(session, job)
    deployment = get_deployment(session, str(job.deployment))
    production = production_of(session, deployment)
    dataset_id = job.spec["dataset_id"]
    adapter = _find_or_add_adapter(session, job, facts, base, probe)
    # Production may have moved since the job was created: what either learned from is named.
    left_out = [
        *job.spec["sources_left_out"],
        *list_sources_left_out(
            session, deployment, dataset_id, training_file=job.spec["training_file"]
        ),
    ]
    release = create_release(
        session,
        deployment,
        adapter=adapter,
        system_prompt=production.system_prompt,
        sampling=production.sampling,
        job_id=job.id,
        suffix=job.spec.get("suffix"),
        dataset_id=dataset_id,
        sources_left_out=list(dict.fromkeys(left_out)),
        created_by=job.created_by,
    )
    try:
        evaluation, _ = create_evaluation(
            session, release, person_id=job.person_id, created_by=job.created_by
        )
    except BadRequest as error:
        return Candidate(release, adapter, None, error.message)
    return Candidate(release, adapter, evaluation, None)


def _find_or_add_adapter(
    session: Session,
    job: Job,
    facts: AdapterFacts,
    base: BaseModel,
    probe: Mapping[str, Any] | None,
) -> Adapter:
    """The row of these weights: the same data and seed give the same ones again."""
    known = select(Adapter).where(Adapter.content_hash == facts.content_hash)
    adapter = session.scalar(known)
    if adapter is None:
        adapter = Adapter(
            id=adapter_id(facts.content_hash),
            content_hash=facts.content_hash,
            r=facts.r,
            lora_alpha=round(facts.lora_alpha),
            target_modules=list(facts.target_modules),
            base_model=base.name,
            base_revision=base.revision,
            template_hash=base.template_hash,
            bytes=facts.size_bytes,
            job_id=job.id,
        )
        try:
            with session.begin_nested():
                session.add(adapter)
                session.flush()
        except IntegrityError:  # another worker stored the same weights at this moment
            adapter = session.scalars(known).one()
    if adapter.probe is None and probe is not None:
        adapter.probe = dict(probe)
        session.flush()
    return adapter
