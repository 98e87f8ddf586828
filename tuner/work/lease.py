"""The lease of a running job, as the worker that does the job holds it.

Owns: the beats that keep it, what is asked of the job meanwhile, and the transaction in which the
job succeeds. Does not own the job's states or what makes a lease stand still (`tuner/jobs.py`), or
what becomes of a job that ended otherwise (`worker.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from feedback.db import Database
from tuner import jobs
from tuner.jobs import LeaseLost, StopRequest
from tuner.tables import Job

logger = logging.getLogger(__name__)


class JobCancelled(Exception):
    """Somebody asked for the running job to end."""


class JobPaused(Exception):
    """Somebody asked for the running job to be put aside."""


class WorkerStopping(Exception):
    """The worker was told to stop."""


ASKED_TO_END = (LeaseLost, WorkerStopping, JobCancelled, JobPaused)
"""What `Lease.check` raises."""


class Lease:
    """A running job's hold, as its handler sees it."""

    def __init__(
        self,
        database: Database,
        job: Job,
        stopping: threading.Event,
        *,
        trainer_place: int | None = None,
    ) -> None:
        self.job = job
        #: descriptor of the lock that a trainer inherits; None for a job that trains nothing
        self.trainer_place = trainer_place
        self._database = database
        self._stopping = stopping
        self._cancelled = threading.Event()
        self._paused = threading.Event()
        self._lost = threading.Event()

    def check(self) -> None:
        """Raise the exception that ends the job, if it must end now.

        One of `LeaseLost`, `WorkerStopping`, `JobCancelled` and `JobPaused`.
        """
        if self._lost.is_set():
            raise LeaseLost(f"attempt {self.job.attempt} no longer holds job {self.job.id}")
        if self._stopping.is_set():
            raise WorkerStopping
        if self._cancelled.is_set():
            raise JobCancelled
        if self._paused.is_set():
            raise JobPaused

    @contextmanager
    def ending(self) -> Iterator[Session]:
        """The write transaction in which the job succeeds.

        It begins with the lease, so that a lost or a cancelled one writes nothing. What is done
        by now is not paused any more.
        """
        with self._database.write() as session:
            if jobs.beat(session, self.job) == StopRequest.CANCEL:
                raise JobCancelled
            yield session

    @contextmanager
    def kept(self, interval: float, *, meanwhile: Callable[[], None]) -> Iterator[None]:
        """Beat every `interval` seconds while the block runs, and call `meanwhile` after each."""
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(interval):
                try:
                    self._beat()
                    meanwhile()
                except LeaseLost:
                    self._lost.set()
                    return
                except Exception as error:  # the thread's top: the database may be away
                    logger.warning(
                        "Lease not beaten: %s",
                        error,
                        extra={"action": "beat_failed", "job": self.job.id},
                    )

        keeper = threading.Thread(target=keep, name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()

    def _beat(self) -> None:
        with self._database.write() as session:
            match jobs.beat(session, self.job):
                case StopRequest.CANCEL:
                    self._cancelled.set()
                case StopRequest.PAUSE:
                    self._paused.set()
