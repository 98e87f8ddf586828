"""Jobs of kind `tune`: a data set becomes an adapter and a candidate release.

Owns: the course of such a job, and how its hyperparameters become the trainer's configuration. Does
not own the child (`trainer.py`), the rows of a candidate (`candidates.py`) or what stays on disk
(`remains.py`). torch is never loaded here: what leaks or crashes there ends with the child.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from feedback import audit
from feedback.tables import File
from tuner import jobs
from tuner.adapter_checks import check_adapter
from tuner.adapters import AdapterFacts
from tuner.base_models import BaseModel, describe_base
from tuner.environment import environment_for_others
from tuner.job_events import NewEvent
from tuner.jobs import JobFailed
from tuner.methods import HYPERPARAMETERS, default_of
from tuner.tables import Job
from tuner.training.config import TrainingConfig, trainer_environment
from tuner.work.candidates import (
    Candidate,
    check_base,
    create_candidate,
    find_data_hash,
    get_training_files,
    get_validation_file,
    verify_files,
)
from tuner.work.journal import Journal
from tuner.work.lease import Lease
from tuner.work.remains import JOBS_FOLDER, remove_adapter_without_row, tidy_job
from tuner.work.trainer import TrainerCommand, run_trainer
from tuner.work.workbench import Workbench, WorkerOptions

ACTOR = "worker"
"""In the audit log."""


def tune_adapter(bench: Workbench, lease: Lease) -> None:
    """Train, store the adapter, and make a candidate release, whose evaluation is queued."""
    job = lease.job
    options = bench.options
    folder = options.data / JOBS_FOLDER / job.id
    base = _describe_base(options)
    with bench.database.read() as session:
        check_base(session, job, base)
        files = get_training_files(session, job)
        validation = get_validation_file(session, job)
        data_hash = find_data_hash(session, job, files)
    read = [*files, *([] if validation is None else [validation])]
    verify_files(read, options.data, check=lease.check)
    config = _build_config(options, job, base, files, validation, data_hash)
    _write(folder / "config.json", config.to_json())
    journal = Journal(bench.database, job)
    finished = run_trainer(
        TrainerCommand(options.trainer, _environment(config.threads)),
        folder / "config.json",
        log=folder / "trainer.log",
        on_events=journal.record_trainer,
        check=lease.check,
        pass_fds=() if lease.trainer_place is None else (lease.trainer_place,),
    )
    manifest = finished.get("manifest") or {}
    _write(folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    facts = _store_adapter(bench, folder / str(finished["adapter"]), base)
    try:
        with lease.ending() as session:
            journal.flush(session)
            candidate = create_candidate(session, job, facts, base, probe=finished.get("probe"))
            result = {
                "trained_tokens": journal.epoch_tokens * int(manifest.get("epochs") or 1),
                "metrics": finished.get("metrics") or {},
                "manifest": manifest,
            }
            _record_candidate(session, job, candidate, result)
    except Exception:
        # Without its row nobody would ever look for these files.
        with suppress(SQLAlchemyError):
            remove_adapter_without_row(bench.database, bench.store, facts.content_hash)
        raise
    tidy_job(folder)


def tidy_after(bench: Workbench, job: Job) -> None:
    """Remove what a job that failed or was cancelled left, but for what explains it."""
    tidy_job(bench.options.data / JOBS_FOLDER / job.id)


def _describe_base(options: WorkerOptions) -> BaseModel:
    return describe_base(
        options.model_dir,
        options.base_name,
        options.model_revision,
        cache=options.data / "models" / "revisions.json",
    )


def _build_config(
    options: WorkerOptions,
    job: Job,
    base: BaseModel,
    files: Sequence[File],
    validation: File | None,
    data_hash: str | None,
) -> TrainingConfig:
    """Everything the trainer needs: the job's hyperparameters over the method's defaults."""
    max_rank, data = options.max_lora_rank, options.data
    settings: dict[str, Any] = {
        "job_id": job.id,
        "method": job.method,
        "base_path": str(base.path.resolve()),
        "base_name": base.name,
        "base_revision": base.revision,
        "train_files": [str((data / file.path).resolve()) for file in files],
        "validation_file": validation and str((data / validation.path).resolve()),
        "output_dir": str((data / "jobs" / job.id).resolve()),
        "references_dir": str((data / "references").resolve()),
        "seed": job.spec["seed"],
        "max_rank": max_rank,
        "threads": options.training_threads or len(os.sched_getaffinity(0)),
        "data_hash": data_hash,
    }
    defaults = TrainingConfig.from_json(json.dumps({**settings, "r": 1}))
    if max_rank < default_of("r"):  # the default's scale, at the largest rank that is served
        scale = default_of("lora_alpha") / default_of("r")
        settings |= {"r": max_rank, "lora_alpha": scale * max_rank}
    for name, value in job.spec["hyperparameters"].items():
        if name == "learning_rate_multiplier":
            value = defaults.learning_rate * value
        settings[HYPERPARAMETERS[name].setting] = value
    longest = settings.get("max_length", default_of("max_length"))
    served = options.max_model_len or base.max_position_embeddings
    settings["max_length"] = min(longest, served, base.max_position_embeddings)
    return TrainingConfig.from_json(json.dumps(settings))


def _store_adapter(bench: Workbench, folder: Path, base: BaseModel) -> AdapterFacts:
    """Check what the trainer made, and put it where engines load from."""
    modules = base.linear_modules
    facts = check_adapter(
        folder,
        base_name=base.name,
        base_revision=base.revision,
        max_rank=bench.options.max_lora_rank,
        target_modules={name.rpartition(".")[2] for name in modules} or None,
        shapes=modules or None,
    )
    stored = bench.store.put(folder)
    if stored != facts.content_hash:
        raise JobFailed(
            "adapter_changed",
            f"the adapter's files changed while they were stored: {facts.content_hash} was "
            f"checked, {stored} arrived.",
        )
    return facts


def _record_candidate(
    session: Session, job: Job, candidate: Candidate, result: dict[str, Any]
) -> None:
    """Events, the job's end and the audit entry of a candidate whose rows are written."""
    release, adapter, evaluation = candidate.release, candidate.adapter, candidate.evaluation
    evaluation_id = evaluation.id if evaluation is not None else None
    told = [NewEvent(f"New release {release.name!r} with adapter {adapter.id}.")]
    if evaluation is not None:
        told.append(NewEvent(f"Evaluation {evaluation.id} against {evaluation.baseline!r}."))
    else:
        told.append(NewEvent(f"Not evaluated: {candidate.not_evaluated}", level="warn"))
    jobs.record_events(session, job, told)
    jobs.finish(
        session,
        job,
        {
            "fine_tuned_model": release.name,
            "adapter": adapter.id,
            "dataset_id": release.dataset_id,
            "evaluation_id": evaluation_id,
            **result,
        },
    )
    audit.append(
        session,
        actor=ACTOR,
        action="release_created",
        subject=release.name,
        details={
            "job": job.id,
            "adapter": adapter.id,
            "adapter_hash": adapter.content_hash,
            "dataset": release.dataset_id,
            "sources_left_out": release.sources_left_out,
            "evaluation": evaluation_id,
        },
    )


def _environment(threads: int) -> dict[str, str]:
    """The child's environment: this process's without our settings, which hold keys."""
    return environment_for_others() | trainer_environment(threads)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    incoming = file.with_name(f".{file.name}.incoming")
    incoming.write_text(text, encoding="utf-8")
    incoming.replace(file)
