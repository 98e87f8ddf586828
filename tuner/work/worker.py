"""The worker: takes jobs and does them, in two lanes.

One lane trains; the other does what is short (data sets, evaluations), so that nobody waits an hour
for seconds of work. Each does one job at a time, under a lease of its own; there is one trainer on
a data directory, whoever started it, and one evaluation, which has the engines' evaluation slot.

Owns: the lanes, the claiming of jobs, the sweeping of stalled ones, how a job ends that didn't
succeed, and how the worker stops. Does not own what each kind of job does (`handlers.py` has a row
for each), the lease of a running job (`lease.py`), the states of a job (`tuner/jobs.py`) or what
stays on disk (`remains.py`). torch is never loaded here: what leaks or crashes there ends with the
trainer, which is a process of its own.

Told to stop (SIGTERM), it gives its jobs back and ends the child; asked to pause a job, it ends the
child too, and the job waits. Killed, it leaves leases that stand still: any other worker's sweep
queues the jobs again, and the next attempt of a training resumes from the checkpoints in the job's
folder.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from types import FrameType

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from feedback import audit
from feedback.db import Database
from tuner import jobs
from tuner.adapters import AdapterStore
from tuner.crashes import describe_crash, trace_of
from tuner.evaluation.gateway_client import GatewayClient
from tuner.jobs import LeaseLost, StalledJobs
from tuner.work.handlers import HANDLERS, TRAINING_KINDS
from tuner.work.lease import ASKED_TO_END, JobCancelled, JobPaused, Lease, WorkerStopping
from tuner.work.reasons import UNFORESEEN, for_the_log, reason_of
from tuner.work.remains import remove_abandoned, tidy_ended_jobs, trainer_place
from tuner.work.workbench import Workbench, WorkerOptions

logger = logging.getLogger(__name__)

_TIDY_SECONDS = 60.0


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
        self._stopping = stopping or threading.Event()
        self._monotonic = monotonic
        self._bench = Workbench(
            database, options, client, AdapterStore(options.data / "adapters"), monotonic
        )
        self._stalled = StalledJobs(
            lease_seconds=options.lease_seconds,
            max_attempts=options.max_attempts,
            monotonic=monotonic,
        )
        self._sweeping = threading.Lock()
        self._tidying = threading.Lock()
        self._swept_at: float | None = None
        self._tidied_at: float | None = None

    def run(self) -> None:
        """Do jobs until told to stop."""
        logger.info("Worker started", extra={"action": "worker_started", "worker": self.name})
        try:
            remove_abandoned(self._database, self._options.data, self._bench.store)
        except (OSError, SQLAlchemyError):
            logger.exception("Remains stay", extra={"action": "remains_left"})
        training = threading.Thread(
            target=self._run_lane, args=(TRAINING_KINDS,), name="training-lane"
        )
        training.start()
        try:
            self._run_lane(HANDLERS.keys() - TRAINING_KINDS)
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
        kinds = HANDLERS.keys() if kinds is None else set(kinds)
        with self._database.read() as session:
            if not jobs.has_queued(session, kinds):
                return False
        if TRAINING_KINDS.isdisjoint(kinds):
            return self._claim_and_do(kinds)
        with trainer_place(self._options.data) as place:
            if place is None:  # another worker trains
                kinds = kinds - TRAINING_KINDS
                return self._claim_and_do(kinds) if kinds else False
            return self._claim_and_do(kinds, trainer_place=place)

    def _claim_and_do(self, kinds: Collection[str], *, trainer_place: int | None = None) -> bool:
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
        lease = Lease(self._database, job, self._stopping, trainer_place=trainer_place)
        interval = min(self._options.poll_seconds, self._options.lease_seconds / 4)
        with lease.kept(interval, meanwhile=self.sweep):
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
            HANDLERS[job.kind].do(self._bench, lease)
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
        if not isinstance(error, ASKED_TO_END):
            try:
                lease.check()
            except ASKED_TO_END as reason:
                error = reason
        code, message = reason_of(error)
        if code == UNFORESEEN:
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
            tidy = HANDLERS[job.kind].tidy
            if tidy is not None and action in ("job_cancelled", "job_failed"):
                tidy(self._bench, job)
        logger.info(
            "Job ended: %s",
            for_the_log(error),
            extra={"action": action, "job": job.id, "kind": job.kind},
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
