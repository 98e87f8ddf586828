"""The kinds of job that a worker does, and by what: one row for each.

A new kind is a module with its handler and a row here. One that fills a row of the database, which
must not wait for ever, says in `tuner/job_subjects.py` what becomes of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tuner.tables import Job, JobKind
from tuner.work.evaluate import evaluate_release
from tuner.work.freeze import freeze_dataset
from tuner.work.lease import Lease
from tuner.work.tune import tidy_after, tune_adapter
from tuner.work.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Handler:
    """How one kind of job is done.

    `do` takes a job from its claim to its result, which it records itself, in `lease.ending()`.
    What it raises ends the job otherwise.
    """

    do: Callable[[Workbench, Lease], None]
    trains: bool = False  #: in the training lane; one at a time on a data directory
    tidy: Callable[[Workbench, Job], None] | None = None  #: after it failed or was cancelled


HANDLERS: Final[Mapping[str, Handler]] = {
    JobKind.FREEZE: Handler(freeze_dataset),
    JobKind.TUNE: Handler(tune_adapter, trains=True, tidy=tidy_after),
    JobKind.EVALUATE: Handler(evaluate_release),
}

TRAINING_KINDS: Final = frozenset(kind for kind, handler in HANDLERS.items() if handler.trains)
