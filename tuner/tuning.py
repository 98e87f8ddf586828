"""Tuning jobs as they are asked for: which examples, which method, which hyperparameters.

Owns: the making of `freeze` and `tune` jobs and every reason to refuse one before it is queued.
Does not own what a method reads and takes (`methods.py`), what the worker does with the jobs
(`work/handlers.py`) or the trainer's full configuration (`training/config.py`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import distinct, func, select
from sqlalchemy.orm import Session

from feedback.curation.examples import ExampleKind
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.tables import Dataset, DatasetRow, DatasetStatus, File
from tuner.job_events import NewEvent, append_events
from tuner.jobs import ENDED, create_job
from tuner.methods import (
    AUTO,
    HYPERPARAMETERS,
    METHODS,
    Method,
    MethodFacts,
    name_methods,
)
from tuner.releases import production_of
from tuner.tables import Deployment, Job, JobKind

LONGEST_SUFFIX = 64
"""Characters; OpenAI's bound."""

FEWEST_JUDGEMENTS = 20
"""With fewer a data set isn't tuned on: what came of it would be chance."""

FEW_JUDGEMENTS = 200
"""With fewer a job says that results vary."""


def check_method(method: str) -> MethodFacts:
    """The facts of `method`. Raises `BadRequest` where there is no such method."""
    if method not in set(Method):
        raise BadRequest(f"Found method {method!r}, expected {name_methods()}.", param="method")
    return METHODS[Method(method)]


def check_dataset_serves(dataset: Dataset, method: str) -> None:
    """Raise `BadRequest` with what to add when `method` can learn nothing from the data set."""
    needs = check_method(method).needs
    if any(dataset.counts.get(kind, 0) > 0 for kind in needs):
        return
    raise BadRequest(
        f"{dataset.id} has 0 {' or '.join(needs)} examples to train on, method {str(method)!r} "
        "needs at least 1. "
        f"{_describe_rest(dataset, method)}",
        param="training_file",
        code="nothing_to_learn",
    )


def count_judgements(session: Session, dataset: Dataset, method: Method) -> int | None:
    """How many judgements of the data set teach by `method`, those in its holdout included.

    A correction may have made two examples, and counts once. None where there are plainly enough:
    `FEW_JUDGEMENTS` or more.
    """
    reads = METHODS[method].reads
    if sum(dataset.counts.get(kind, 0) for kind in reads) >= 2 * FEW_JUDGEMENTS:
        return None  # no judgement makes more than two
    return session.scalar(
        select(func.count(distinct(DatasetRow.judgement_id))).where(
            DatasetRow.dataset_id == dataset.id, DatasetRow.kind.in_(reads)
        )
    )


def _check_judgements(dataset: Dataset, method: Method, found: int | None) -> None:
    if found is None or found >= FEWEST_JUDGEMENTS:
        return
    rows = {kind: dataset.counts.get(kind, 0) for kind in METHODS[method].reads}
    made = ", ".join(f"{count} {kind}" for kind, count in rows.items() if count)
    added = METHODS[method].to_add
    raise BadRequest(
        f"{dataset.id} has {found} {_judgements(found)} that teach by method {str(method)!r} "
        f"(examples to train on: {made}), at least {FEWEST_JUDGEMENTS} are needed: "
        f"{FEWEST_JUDGEMENTS - found} more. {added[0].upper()}{added[1:]}, and make a new data "
        "set. An uploaded file is tuned on whatever its size.",
        param="training_file",
        code="too_few_judgements",
    )


def _judgements(count: int) -> str:
    return "judgement" if count == 1 else "judgements"


def _warn_of_few(found: int | None, files: Sequence[File]) -> str | None:
    """What people should know before they wait for the job; None where there is enough."""
    if found is not None and found < FEW_JUDGEMENTS:
        return (
            f"The data set has {found} judgements that teach. With fewer than {FEW_JUDGEMENTS} "
            "results vary much: read the evaluation and some answers before promoting."
        )
    rows = sum(file.rows for file in files)
    if found is None and rows < FEWEST_JUDGEMENTS:
        return (
            f"{rows} examples are very few: read the evaluation and some answers before promoting."
        )
    return None


def _describe_rest(dataset: Dataset, method: str) -> str:
    """What a data set has instead of what `method` needs, and what to do, in sentences."""
    there = {
        kind: dataset.counts.get(kind, 0) for kind in ExampleKind if dataset.counts.get(kind, 0) > 0
    }
    found = " and ".join(f"{count} {kind}" for kind, count in there.items()) or "no other"
    said = [f"It has {found} ones to train on and {dataset.counts.get('holdout', 0)} held out."]
    others = [other for other in _methods_for(there) if other != method]
    instead = f", or use method {str(others[0])!r}" if others else ""
    action = METHODS[Method(method)].to_add
    return " ".join([*said, f"{action[0].upper()}{action[1:]}{instead}."])


def _methods_for(kinds: Collection[str]) -> list[Method]:
    """The methods that find what they need among examples of `kinds`."""
    return [method for method in Method if any(kind in kinds for kind in METHODS[method].needs)]


def check_hyperparameters(given: Mapping[str, Any], method: Method) -> dict[str, int | float | str]:
    """The hyperparameters that were set, `auto` left out.

    Raises `BadRequest` naming what is wrong: also one that changes nothing in `method`.
    """
    checked: dict[str, int | float | str] = {}
    for name, value in given.items():
        if name not in HYPERPARAMETERS:
            raise BadRequest(
                f"Unknown hyperparameter {name!r}; expected one of {', '.join(HYPERPARAMETERS)}.",
                param=f"hyperparameters.{name}",
            )
        if value is None or value == AUTO:
            continue
        known = HYPERPARAMETERS[name]
        taken = known.find_value(value)
        if taken is None:
            raise BadRequest(
                f"Hyperparameter {name!r} ({known.meaning}) is {reprlib.repr(value)}; expected "
                f"'auto' or {known.expected}.",
                param=f"hyperparameters.{name}",
            )
        if method not in known.methods:
            raise BadRequest(
                f"Hyperparameter {name!r} ({known.meaning}) changes nothing in method "
                f"{str(method)!r}; leave it out, or use method {name_methods(known.methods)}.",
                param=f"hyperparameters.{name}",
            )
        checked[name] = taken
    if "learning_rate" in checked and "learning_rate_multiplier" in checked:
        raise BadRequest(
            "Found both learning_rate and learning_rate_multiplier; give one of them.",
            param="hyperparameters.learning_rate",
        )
    return checked


def check_suffix(suffix: str) -> None:
    """Raise `BadRequest` unless people can read it in a line."""
    if not 1 <= len(suffix) <= LONGEST_SUFFIX or not suffix.isprintable():
        raise BadRequest(
            f"suffix is {reprlib.repr(suffix)}; expected 1 to {LONGEST_SUFFIX} printable "
            "characters.",
            param="suffix",
        )


def create_tuning_job(
    session: Session,
    deployment: Deployment,
    *,
    method: str,
    training_file: str,
    validation_file: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    suffix: str | None = None,
    seed: int = 0,
    max_rank: int | None = None,
    person_id: str | None = None,
    created_by: str | None = None,
) -> Job:
    """Queue a tuning job for a deployment.

    `training_file` is a data set (`ds_…`: everything in it that the method learns from) or one file
    (`file-…`: that file alone). `validation_file` is one file, whose rows end the run early and
    never train; None: a part of the training rows is held back. The caller has checked that the
    files may be used. `suffix` is what the person calls the release. `max_rank` is the largest that
    the engines serve. Raises `BadRequest`, `NotFound`, `Conflict` when the data set isn't ready.
    """
    check_method(method)
    if suffix is not None:
        check_suffix(suffix)
    checked = check_hyperparameters(hyperparameters or {}, Method(method))
    rank = checked.get("r")
    if max_rank is not None and isinstance(rank, int) and rank > max_rank:
        raise BadRequest(
            f"Hyperparameter 'r' is {rank}, but the engines serve ranks up to {max_rank}; "
            "use a smaller one or raise engine.max_lora_rank.",
            param="hyperparameters.r",
        )
    found: int | None = None
    if training_file.startswith("ds_"):
        dataset_id: str | None = training_file
        dataset = _get_dataset(session, deployment, training_file)
        files = _dataset_files(session, dataset, method)
        found = count_judgements(session, dataset, Method(method))
        _check_judgements(dataset, Method(method), found)
    else:
        file = _get_training_file(session, deployment, training_file, method)
        files, dataset_id = [file], file.dataset_id
    if validation_file is not None:
        validation = _get_validation_file(session, deployment, validation_file, method)
        _refuse_the_same(validation, files, training_file)
    job = create_job(
        session,
        JobKind.TUNE,
        spec={
            "training_file": training_file,
            "dataset_id": dataset_id,
            "files": [file.id for file in files],
            "validation_file": validation_file,
            "hyperparameters": checked,
            "suffix": suffix,
            "seed": seed,
            "sources_left_out": list_sources_left_out(
                session, deployment, dataset_id, training_file=training_file
            ),
        },
        method=str(method),
        deployment=deployment.name,
        person_id=person_id,
        created_by=created_by,
    )
    if (warning := _warn_of_few(found, files)) is not None:
        append_events(session, job.id, job.attempt, [NewEvent(warning, level="warn")])
    return job


def list_sources_left_out(
    session: Session, deployment: Deployment, dataset_id: str | None, *, training_file: str
) -> list[str]:
    """The sources that production learned from and a candidate of `training_file` doesn't.

    `dataset_id` is the data set that the file belongs to, None for an upload. A newer data set of
    the same deployment holds what an older one held, so an upload leaves a data set out, and
    everything else leaves out an upload that production learned from.
    """
    production = production_of(session, deployment)
    if production.dataset_id is not None:
        return [production.dataset_id] if dataset_id is None else []
    job = session.get(Job, production.job_id) if production.job_id is not None else None
    learned = job.spec.get("training_file") if job is not None else None
    return [learned] if learned not in (None, training_file) else []


def find_job_on(session: Session, file_id: str) -> str | None:
    """A tuning job that still needs the file, or None."""
    unfinished = select(Job).where(Job.kind == JobKind.TUNE, Job.status.not_in(ENDED))
    for job in session.scalars(unfinished):
        if file_id in list_files_of(job):
            return job.id
    return None


def list_files_of(job: Job) -> list[str]:
    """Ids of the files that a tuning job reads: those it trains on, then what it validates with."""
    validation_file = job.spec.get("validation_file")
    return [*job.spec.get("files", []), *([] if validation_file is None else [validation_file])]


def create_freeze_job(
    session: Session,
    dataset: Dataset,
    *,
    person_id: str | None = None,
    created_by: str | None = None,
) -> Job:
    """Queue the writing of a data set whose row exists."""
    job = create_job(
        session,
        JobKind.FREEZE,
        spec={"dataset_id": dataset.id},
        deployment=dataset.deployment,
        person_id=person_id,
        created_by=created_by,
    )
    dataset.job_id = job.id
    session.flush()
    return job


def _get_dataset(
    session: Session,
    deployment: Deployment,
    dataset_id: str,
    *,
    named: str | None = None,
    param: str = "training_file",
) -> Dataset:
    """The data set, ready; `named` is how the request names it, or a file of it."""
    named = named or dataset_id
    dataset = session.get(Dataset, dataset_id)
    if dataset is None:
        raise NotFound(f"No data set {dataset_id!r}.", param=param)
    if dataset.deployment != deployment.name:
        raise BadRequest(
            f"{named} was made from the answers of {dataset.deployment!r}, not of "
            f"{deployment.name!r}.",
            param=param,
        )
    if dataset.status != DatasetStatus.READY:
        raise Conflict(
            f"{named} is {dataset.status}, expected ready; wait for it or make another.",
            param=param,
            code="dataset_not_ready",
        )
    return dataset


def _dataset_files(session: Session, dataset: Dataset, method: str) -> Sequence[File]:
    check_dataset_serves(dataset, method)
    kinds: Sequence[str] = METHODS[Method(method)].reads
    files = session.scalars(
        select(File).where(
            File.dataset_id == dataset.id,
            File.side == "train",
            File.dialect == "trl",
            File.kind.in_(kinds),
            File.rows > 0,
        )
    )
    return sorted(files, key=lambda file: kinds.index(str(file.kind)))


def _get_file(session: Session, deployment: Deployment, file_id: str, *, param: str) -> File:
    # Held until the job stands, so that nobody deletes an upload in between.
    file = session.get(File, file_id, with_for_update={"read": True})
    if file is None:
        raise NotFound(f"No file {file_id!r}.", param=param)
    if file.dataset_id is not None:
        named = f"{file_id} of {file.dataset_id}"
        _get_dataset(session, deployment, file.dataset_id, named=named, param=param)
    return file


def _get_training_file(session: Session, deployment: Deployment, file_id: str, method: str) -> File:
    facts = METHODS[Method(method)]
    file = _get_file(session, deployment, file_id, param="training_file")
    if file.side == "holdout":
        raise BadRequest(
            f"{file_id} is the holdout of {file.dataset_id}; it is never trained on.",
            param="training_file",
        )
    if file.rows == 0:
        raise BadRequest(
            f"{file_id} has 0 examples; {facts.to_add}.",
            param="training_file",
            code="nothing_to_learn",
        )
    if file.kind is not None and file.kind not in facts.needs:
        fitting = _methods_for([file.kind])
        instead = f"; use method {str(fitting[0])!r}" if fitting else ""
        raise BadRequest(
            f"{file_id} has {file.kind} examples, method {str(method)!r} needs "
            f"{' or '.join(facts.needs)} ones{instead}.",
            param="training_file",
        )
    return file


def _get_validation_file(
    session: Session, deployment: Deployment, file_id: str, method: str
) -> File:
    param = "validation_file"
    if file_id.startswith("ds_"):
        raise BadRequest(
            f"{file_id} is a data set, and validation_file takes one file (file-…); the data set's "
            "own are in its `files`.",
            param=param,
        )
    file = _get_file(session, deployment, file_id, param=param)
    if file.side == "holdout":
        raise BadRequest(
            f"{file_id} is the holdout of {file.dataset_id}, which is kept for evaluations: a run "
            "that it ended would be measured by what chose it.",
            param=param,
        )
    if file.rows == 0:
        raise BadRequest(
            f"{file_id} has 0 examples; without validation_file a part of the training rows is "
            "held back.",
            param=param,
        )
    reads = METHODS[Method(method)].reads
    if file.kind is not None and file.kind not in reads:
        raise BadRequest(
            f"{file_id} has {file.kind} examples, method {str(method)!r} reads "
            f"{' and '.join(reads)} ones.",
            param=param,
        )
    return file


def _refuse_the_same(validation: File, files: Sequence[File], training_file: str) -> None:
    """Raise `BadRequest` where every row would be held back from training."""
    for file in files:
        if file.id == validation.id or file.sha256 == validation.sha256:
            whose = training_file if file.id == training_file else f"{file.id} of {training_file}"
            raise BadRequest(
                f"{validation.id} has the same rows as {whose}, which is trained on; rows that "
                "validate never train, so give others.",
                param="validation_file",
            )
