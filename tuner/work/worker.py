"""The worker: takes jobs and does them, in two lanes.

One lane trains; the other does what is short (data sets, evaluations), so that nobody waits an hour
for seconds of work. Each does one job at a time, under a lease of its own; there is one trainer on
a data directory, whoever started it, and one evaluation, which has the engines' evaluation slot.

Owns: the lanes, the leases of running jobs, and what each kind of job does from claim to result.
Does not own the states of a job (`jobs.py`), the trainer child (`trainer.py`), the rows of a
candidate (`candidates.py`), what stays on disk (`remains.py`) or the requests to the gateway
(`evaluation/gateway_client.py`). torch is never loaded here: what leaks or crashes there ends with
the child.

Told to stop (SIGTERM), it gives its jobs back and ends the child; asked to pause a job, it ends the
child too, and the job waits. Killed, it leaves leases that stand still: any other worker's sweep
queues the jobs again, and the next attempt of a training resumes from the checkpoints in the job's
folder.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from feedback import audit
from feedback.datasets import finish_freeze, freeze
from feedback.db import Database
from feedback.errors import AppError
from feedback.tables import File
from tuner import jobs
from tuner.adapters import AdapterFacts, AdapterRefused, AdapterStore, check_adapter
from tuner.base_models import BaseModel, BaseModelError, describe_base
from tuner.crashes import describe_crash, trace_of
from tuner.evaluation.evaluations import find_holdout_files, load_subject, record_verdict
from tuner.evaluation.gateway_client import (
    GatewayClient,
    GatewayError,
    GatewayUnreachable,
    SlotLost,
)
from tuner.evaluation.holdout import Holdout
from tuner.evaluation.measurement import run_evaluation
from tuner.jobs import JobFailed, LeaseLost, NewEvent, Request, StalledJobs
from tuner.methods import HYPERPARAMETERS, default_of
from tuner.tables import Job, JobKind
from tuner.training.config import ConfigError, TrainingConfig, child_environment
from tuner.work.candidates import (
    Candidate,
    check_base,
    create_candidate,
    find_data_hash,
    get_training_files,
    get_validation_file,
    verify_files,
)
from tuner.work.journal import Journal, Progress
from tuner.work.remains import (
    JOBS_FOLDER,
    remove_abandoned,
    remove_adapter_without_row,
    tidy_ended_jobs,
    tidy_job,
    trainer_place,
)
from tuner.work.trainer import TrainerCommand, TrainingFailed, environment_for_others, run_trainer

logger = logging.getLogger(__name__)

ACTOR = "worker"
TRAINER = (sys.executable, "-P", "-m", "tuner.training")

_TIDY_SECONDS = 60.0


class JobCancelled(Exception):
    """Somebody asked for the running job to end."""


class JobPaused(Exception):
    """Somebody asked for the running job to be put aside."""


class WorkerStopping(Exception):
    """The worker was told to stop."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker needs to know; times in seconds."""

    database_url: str
    data: Path  #: the directory that holds everything; files' paths are below it
    model_dir: Path
    base_name: str
    gateway_url: str
    api_key: str  #: the internal key
    model_revision: str | None = None
    max_lora_rank: int = 16
    max_model_len: int | None = None  #: tokens that the engine reads at most; None: the base's own
    training_threads: int | None = None  #: None: all cores
    lease_seconds: float = 30.0
    poll_seconds: float = 1.0
    max_attempts: int = 3
    seal: audit.Seal | None = None  #: what entries of the audit log are signed with
    trainer: Sequence[str] = TRAINER  #: command of the child; the configuration's path is appended


class Lease:
    """A running job's hold, as its handler sees it."""

    def __init__(self, job: Job, stopping: threading.Event) -> None:
        self.job = job
        self.cancelled = threading.Event()
        self.paused = threading.Event()
        self.lost = threading.Event()
        self._stopping = stopping

    def check(self) -> None:
        """Raise the exception that ends the job, if it must end now.

        One of `LeaseLost`, `WorkerStopping`, `JobCancelled` and `JobPaused`.
        """
        if self.lost.is_set():
            raise LeaseLost(f"attempt {self.job.attempt} no longer holds job {self.job.id}")
        if self._stopping.is_set():
            raise WorkerStopping
        if self.cancelled.is_set():
            raise JobCancelled
        if self.paused.is_set():
            raise JobPaused


class Worker:
    """Does jobs for one database. `run` is its loop, `run_one` one turn of it."""

    def __init__(
        self,
        database: Database,
        options: WorkerOptions,
        client: GatewayClient,
        *,
        stopping: threading.Event | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._database = database
        self._options = options
        self._client = client
        self._stopping = stopping or threading.Event()
        self._monotonic = monotonic
        self._store = AdapterStore(options.data / "adapters")
        self._stalled = StalledJobs(
            lease_seconds=options.lease_seconds,
            max_attempts=options.max_attempts,
            monotonic=monotonic,
        )
        self._sweeping = threading.Lock()
        self._tidying = threading.Lock()
        self._swept_at: float | None = None
        self._tidied_at: float | None = None
        self._trainer_place: int | None = None  #: descriptor of the lock, while training
        self._handlers: dict[str, Callable[[Lease], None]] = {
            JobKind.FREEZE: self._freeze,
            JobKind.TUNE: self._tune,
            JobKind.EVALUATE: self._evaluate,
        }

    def run(self) -> None:
        """Do jobs until told to stop."""
        logger.info("Worker started", extra={"action": "worker_started", "worker": self.name})
        try:
            remove_abandoned(self._database, self._options.data, self._store)
        except (OSError, SQLAlchemyError):
            logger.exception("Remains stay", extra={"action": "remains_left"})
        training = threading.Thread(
            target=self._run_lane, args=([JobKind.TUNE],), name="training-lane"
        )
        training.start()
        try:
            self._run_lane([kind for kind in self._handlers if kind != JobKind.TUNE])
        finally:
            training.join()
        logger.info("Worker stopped", extra={"action": "worker_stopped", "worker": self.name})

    def _run_lane(self, kinds: Collection[str]) -> None:
        """Do jobs of `kinds`. A lane that ends takes the worker with it, to be started again."""
        try:
            while not self._stopping.is_set():
                try:
                    self.sweep()
                    self.tidy()
                    worked = self.run_one(kinds)
                except Exception:  # the loop's top: the database may be away for a while
                    logger.exception("Worker's turn failed", extra={"action": "worker_turn_failed"})
                    worked = False
                if not worked:
                    self._stopping.wait(self._options.poll_seconds)
        finally:
            self._stopping.set()

    def run_one(self, kinds: Collection[str] | None = None) -> bool:
        """Claim a job of `kinds` (None: of any) and do it to its end; False when none waits."""
        kinds = self._handlers.keys() if kinds is None else kinds
        with self._database.read() as session:
            if not jobs.has_queued(session, kinds):
                return False
        if JobKind.TUNE not in kinds:
            return self._claim_and_do(kinds)
        with trainer_place(self._options.data) as place:
            if place is None:  # another worker trains
                kinds = [kind for kind in kinds if kind != JobKind.TUNE]
                return self._claim_and_do(kinds) if kinds else False
            self._trainer_place = place
            return self._claim_and_do(kinds)

    def _claim_and_do(self, kinds: Collection[str]) -> bool:
        with self._database.write() as session:
            job = jobs.claim_job(session, self.name, kinds=kinds)
        if job is None:
            return False
        logger.info(
            "Job claimed",
            extra={
                "action": "job_claimed",
                "job": job.id,
                "kind": job.kind,
                "attempt": job.attempt,
            },
        )
        lease = Lease(job, self._stopping)
        with self._kept(lease):
            self._do(lease)
        return True

    def sweep(self) -> None:
        """Queue stalled jobs again, at most four times a lease.

        Quick, because leases are kept by those who call it.
        """
        if not self._sweeping.acquire(blocking=False):
            return  # another thread does
        try:
            self._take_back_stalled()
        finally:
            self._sweeping.release()

    def tidy(self) -> None:
        """Remove what ended jobs left, once a minute; as slow as the disk is."""
        if not self._tidying.acquire(blocking=False):
            return  # the other lane does
        try:
            at = self._monotonic()
            if self._tidied_at is None or at - self._tidied_at >= _TIDY_SECONDS:
                self._tidied_at = at
                tidy_ended_jobs(self._database, self._options.data)
        finally:
            self._tidying.release()

    def _take_back_stalled(self) -> None:
        at = self._monotonic()
        if self._swept_at is not None and at - self._swept_at < self._options.lease_seconds / 4:
            return
        self._swept_at = at
        with self._database.read() as session:
            found = self._stalled.find(session)
        for stalled in found:
            with self._database.write() as session:
                job = self._stalled.take_back(session, stalled)
            if job is not None:
                logger.warning(
                    "Stalled job taken back",
                    extra={"action": "job_stalled", "job": job.id, "status": str(job.status)},
                )

    def _do(self, lease: Lease) -> None:
        """Run the job's handler and record how it ended when that wasn't success."""
        job = lease.job
        try:
            lease.check()
            self._handlers[job.kind](lease)
        except Exception as error:
            self._end(lease, error)
        else:
            logger.info("Job succeeded", extra={"action": "job_succeeded", "job": job.id})

    def _end(self, lease: Lease, error: Exception) -> None:
        """Record that the job ended by `error`: given back, cancelled, paused or failed."""
        job = lease.job
        if isinstance(error, OperationalError):
            # The database went away under the job. Its lease stands still from now on, so that a
            # sweep queues it again, a limited number of times.
            logger.error("Job left: %s", error, extra={"action": "job_left", "job": job.id})
            return
        # A call that the stop or the loss itself cut short says something else than these do.
        if not isinstance(error, LeaseLost | WorkerStopping | JobCancelled | JobPaused):
            try:
                lease.check()
            except (LeaseLost, WorkerStopping, JobCancelled, JobPaused) as reason:
                error = reason
        code, message = _reason(error)
        if code == "internal_error":
            # A trace with the error's words could repeat what people wrote.
            logger.error(
                "Job crashed: %s",
                error if isinstance(error, SQLAlchemyError) else describe_crash(error),
                extra={"action": "job_crashed", "job": job.id, "trace": trace_of(error)},
            )
        action = "lease_lost"
        if not isinstance(error, LeaseLost):
            with suppress(LeaseLost), self._database.write() as session:
                if isinstance(error, WorkerStopping):
                    jobs.give_back(session, job)
                    action = "job_given_back"
                elif isinstance(error, JobCancelled):
                    jobs.cancel(session, job)
                    action = "job_cancelled"
                elif isinstance(error, JobPaused):
                    jobs.pause(session, job)
                    action = "job_paused"
                else:
                    jobs.fail(session, job, code, message)
                    action = "job_failed"
            if job.kind == JobKind.TUNE and action in ("job_cancelled", "job_failed"):
                tidy_job(self._options.data / JOBS_FOLDER / job.id)
        # A refusal's words may be an engine's, which may repeat a prompt: the job alone has them.
        said = code if isinstance(error, GatewayError | GatewayUnreachable) else message
        logger.info(
            "Job ended: %s", said, extra={"action": action, "job": job.id, "kind": job.kind}
        )

    @contextmanager
    def _ending(self, lease: Lease) -> Iterator[Session]:
        """The write transaction in which a job succeeds.

        It begins with the lease, so that a lost or a cancelled one writes nothing. What is done
        by now is not paused any more.
        """
        with self._database.write() as session:
            if jobs.beat(session, lease.job) == Request.CANCEL:
                raise JobCancelled
            yield session

    @contextmanager
    def _kept(self, lease: Lease) -> Iterator[None]:
        """Beat the job's lease, hear what is asked of it, and sweep, while the block runs."""
        ended = threading.Event()
        interval = min(self._options.poll_seconds, self._options.lease_seconds / 4)

        def keep() -> None:
            while not ended.wait(interval):
                try:
                    with self._database.write() as session:
                        match jobs.beat(session, lease.job):
                            case Request.CANCEL:
                                lease.cancelled.set()
                            case Request.PAUSE:
                                lease.paused.set()
                    self.sweep()
                except LeaseLost:
                    lease.lost.set()
                    return
                except Exception as error:  # the thread's top: the database may be away
                    logger.warning(
                        "Lease not beaten: %s",
                        error,
                        extra={"action": "beat_failed", "job": lease.job.id},
                    )

        keeper = threading.Thread(target=keep, name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()

    def _freeze(self, lease: Lease) -> None:
        """Judged answers become a data set."""
        dataset_id = str(lease.job.spec["dataset_id"])
        frozen = freeze(self._database, dataset_id, data=self._options.data, check=lease.check)
        with self._ending(lease) as session:
            dataset = finish_freeze(session, dataset_id, frozen)
            jobs.finish(
                session,
                lease.job,
                {
                    "dataset_id": dataset.id,
                    "counts": dataset.counts,
                    "dropped": dataset.dropped,
                    "content_hash": dataset.content_hash,
                },
            )

    def _tune(self, lease: Lease) -> None:
        """A data set becomes an adapter and a candidate release, whose evaluation is queued."""
        job = lease.job
        folder = self._options.data / JOBS_FOLDER / job.id
        base = self._describe_base()
        with self._database.read() as session:
            check_base(session, job, base)
            files = get_training_files(session, job)
            validation = get_validation_file(session, job)
            data_hash = find_data_hash(session, job, files)
        read = [*files, *([] if validation is None else [validation])]
        verify_files(read, self._options.data, check=lease.check)
        config = self._build_config(job, base, files, validation, data_hash)
        _write(folder / "config.json", config.to_json())
        journal = Journal(self._database, job)
        finished = run_trainer(
            TrainerCommand(self._options.trainer, _environment(config.threads)),
            folder / "config.json",
            log=folder / "trainer.log",
            on_events=journal.record_trainer,
            check=lease.check,
            pass_fds=() if self._trainer_place is None else (self._trainer_place,),
        )
        manifest = finished.get("manifest") or {}
        _write(folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        facts = self._store_adapter(folder / str(finished["adapter"]), base)
        try:
            with self._ending(lease) as session:
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
                remove_adapter_without_row(self._database, self._store, facts.content_hash)
            raise
        tidy_job(folder)

    def _describe_base(self) -> BaseModel:
        options = self._options
        return describe_base(
            options.model_dir,
            options.base_name,
            options.model_revision,
            cache=options.data / "models" / "revisions.json",
        )

    def _build_config(
        self,
        job: Job,
        base: BaseModel,
        files: Sequence[File],
        validation: File | None,
        data_hash: str | None,
    ) -> TrainingConfig:
        """Everything the trainer needs: the job's hyperparameters over the method's defaults."""
        max_rank, data = self._options.max_lora_rank, self._options.data
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
            "threads": self._options.training_threads or len(os.sched_getaffinity(0)),
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
        served = self._options.max_model_len or base.max_position_embeddings
        settings["max_length"] = min(longest, served, base.max_position_embeddings)
        return TrainingConfig.from_json(json.dumps(settings))

    def _store_adapter(self, folder: Path, base: BaseModel) -> AdapterFacts:
        """Check what the trainer made, and put it where engines load from."""
        modules = base.linear_modules
        facts = check_adapter(
            folder,
            base_name=base.name,
            base_revision=base.revision,
            max_rank=self._options.max_lora_rank,
            target_modules={name.rpartition(".")[2] for name in modules} or None,
            shapes=modules or None,
        )
        stored = self._store.put(folder)
        if stored != facts.content_hash:
            raise JobFailed(
                "adapter_changed",
                f"the adapter's files changed while they were stored: {facts.content_hash} was "
                f"checked, {stored} arrived.",
            )
        return facts

    def _evaluate(self, lease: Lease) -> None:
        """A candidate is compared with its baseline, and the gate decides."""
        evaluation_id = str(lease.job.spec["evaluation_id"])
        with self._database.read() as session:
            subject = load_subject(session, evaluation_id)
            files = find_holdout_files(session, evaluation_id, data=self._options.data)
        try:
            rows = Holdout(files, check=lease.check)
        except FileNotFoundError as error:
            raise JobFailed(
                "holdout_missing",
                f"{Path(str(error.filename)).name!r} of the data set is not on disk; restore it, "
                "or make a new data set.",
            ) from None
        subject = replace(subject, rows=rows, left_out=rows.left_out)
        journal = Journal(self._database, lease.job)
        progress = Progress(journal, lease.check, self._monotonic)
        verdict, metrics = run_evaluation(self._client, subject, report=progress.report)
        reasons = list(verdict.reasons)
        with self._ending(lease) as session:
            journal.flush(session)
            record_verdict(session, evaluation_id, verdict, metrics)
            told = NewEvent(
                f"{subject.candidate.name!r} against {subject.baseline.name!r}: "
                f"{verdict.decision}. {' '.join(reasons)}",
                data={"decision": str(verdict.decision), "reasons": reasons},
            )
            jobs.record_events(session, lease.job, [told])
            jobs.finish(
                session,
                lease.job,
                {
                    "evaluation_id": evaluation_id,
                    "decision": str(verdict.decision),
                    "reasons": reasons,
                    "metrics": metrics,
                },
            )


def run_worker(options: WorkerOptions) -> None:
    """The worker's process: do jobs until SIGTERM or SIGINT, then give back the running one.

    Returns after the trainer child, if any, has ended. Call it in the main thread.
    """
    stopping = threading.Event()

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    database = Database(options.database_url)
    if options.seal is not None:
        audit.seal(database, options.seal)
    try:
        with GatewayClient(options.gateway_url, options.api_key, stopped=stopping) as client:
            Worker(database, options, client, stopping=stopping).run()
    finally:
        database.dispose()
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(error: Exception) -> tuple[str, str]:
    """A stable code and a sentence for people: why a job ended by `error`."""
    match error:
        case JobFailed() | TrainingFailed() | AdapterRefused():
            return error.code, error.message
        case AppError():
            return error.code or "refused", error.message
        case SlotLost():
            return "evaluation_slot_lost", str(error)
        case GatewayError():
            return error.code or "gateway_refused", str(error)
        case GatewayUnreachable():
            return "gateway_unreachable", str(error)
        case BaseModelError():
            return "base_unfit", str(error)
        case ConfigError():
            return "bad_hyperparameters", str(error)
        case LeaseLost():
            return "lease_lost", str(error)
        case WorkerStopping():
            return "worker_stopping", "the worker is shutting down"
        case JobCancelled():
            return "cancelled", "somebody asked for it"
        case JobPaused():
            return "paused", "somebody asked for it"
        case OSError():
            return "storage_failed", str(error)
        case _:
            return "internal_error", f"{describe_crash(error)}; see the worker's log."


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
    return environment_for_others() | child_environment(threads)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    incoming = file.with_name(f".{file.name}.incoming")
    incoming.write_text(text, encoding="utf-8")
    incoming.replace(file)
