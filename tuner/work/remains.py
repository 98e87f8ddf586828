"""Cleans up the files of tuning jobs that have ended, and what crashes left on disk.

Owns: which files explain a run and stay, and the search for what crashes left. Never touches what a
job that is queued, running or paused needs. Does not own how a run writes its files
(`training/checkpoint.py`, `feedback/datasets.py`, `adapters.py`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import select

from feedback import datasets
from feedback.db import Database
from tuner.adapters import AdapterStore
from tuner.jobs import ENDED
from tuner.tables import Adapter, Job, JobKind

logger = logging.getLogger(__name__)

JOBS_FOLDER = "jobs"
"""Below the directory that holds everything: a folder for each tuning job, named by its id."""

_KEPT = frozenset({"config.json", "trainer.log", "manifest.json"})
_ABANDONED_SECONDS = 3600.0  # longer than anybody takes from a file to its row


def tidy_job(folder: Path) -> bool:
    """Remove checkpoints and the trainer's copy of the adapter; True where there was something.

    What can't be removed stays, for the next time.
    """
    found = False
    with suppress(FileNotFoundError):
        for entry in folder.iterdir():
            if entry.name in _KEPT:
                continue
            found = True
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink()
    return found


def tidy_ended_jobs(database: Database, data: Path) -> None:
    """Do so for every tuning job that has ended, and for data sets that are no longer written."""
    for folder in _folders(data / JOBS_FOLDER):
        if not _is_tidy(folder) and _has_ended(database, folder.name):
            tidy_job(folder)
            logger.info("Job's remains removed", extra={"action": "job_tidied", "job": folder.name})
    for folder in _folders(data / datasets.FOLDER):
        if folder.suffix == ".partial" and not _is_written(database, folder.name.split(".")[0]):
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(database: Database, data: Path, store: AdapterStore) -> None:
    """Remove adapters without a row and half-written files that have lain for an hour."""
    for folder in _folders(store.root):
        if not _is_abandoned(folder):
            continue
        if folder.name.startswith(".incoming-"):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            remove_adapter_without_row(database, store, folder.name)
    for file in (data / "references").glob("*/*/.*"):
        if _is_abandoned(file):
            with suppress(OSError):
                file.unlink()


def remove_adapter_without_row(database: Database, store: AdapterStore, full_hash: str) -> None:
    """Remove an adapter's files unless a row has them."""
    try:
        folder = store.path(full_hash)
    except ValueError:
        return  # not ours
    # A write transaction: nobody adds the row meanwhile (SQLite). On PostgreSQL the worker that
    # stores the same weights at this moment finds them gone and its job fails, to be tried again.
    with database.write() as session:
        if session.scalar(select(Adapter.id).where(Adapter.content_hash == full_hash)) is None:
            shutil.rmtree(folder, ignore_errors=True)
            logger.info(
                "Adapter without a row removed",
                extra={"action": "adapter_removed", "adapter_hash": full_hash},
            )


@contextmanager
def trainer_place(data: Path) -> Iterator[int | None]:
    """The place for the one trainer on this data directory; None where somebody else has it.

    It is a file lock whose descriptor the trainer inherits, so that it lasts as long as the worker
    or the trainer does, however either ends.
    """
    folder = data / "run"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "trainer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(entry for entry in parent.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []


def _is_tidy(folder: Path) -> bool:
    try:
        return all(entry.name in _KEPT for entry in folder.iterdir())
    except FileNotFoundError:  # another worker's sweep was here first
        return True


def _has_ended(database: Database, job_id: str) -> bool:
    """Whether a job has ended; true for a deleted one too."""
    with database.read() as session:
        job = session.get(Job, job_id)
    return job is None or job.status in ENDED


def _is_written(database: Database, dataset_id: str) -> bool:
    """True while a job that writes this data set has not ended."""
    freezing = select(Job).where(Job.kind == JobKind.FREEZE, Job.status.not_in(ENDED))
    with database.read() as session:
        return any(job.spec.get("dataset_id") == dataset_id for job in session.scalars(freezing))


def _is_abandoned(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except FileNotFoundError:
        return False
