"""What a running job tells: a trainer's events and an evaluation's progress, as the job's events.

Owns: their words, and that they wait while the database is away. Does not own the numbering and the
lease of events (`jobs.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from feedback.db import Database
from tuner.job_events import NewEvent
from tuner.jobs import record_events
from tuner.tables import Job
from tuner.work.trainer import Event

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 1.0
_PER_WRITE = 200  # a transaction of a few milliseconds
_MOST_HELD = 10_000


class Journal:
    """Writes a job's events as they arrive, and holds them while the database is away."""

    def __init__(self, database: Database, job: Job) -> None:
        self._database = database
        self._job = job
        self._held: list[NewEvent] = []
        self.epoch_tokens = 0  #: what one epoch trains on, as the trainer counted it

    def record_trainer(self, events: Sequence[Event]) -> None:
        """Write a trainer's events. Raises `LeaseLost`."""
        for event in events:
            if event["event"] == "started":
                self.epoch_tokens = int(event.get("tokens") or 0)
        self.record(to_job_events(events))

    def record(self, events: Sequence[NewEvent]) -> None:
        """Write `events`, after those that were held. Raises `LeaseLost`."""
        self._held += events
        del self._held[:-_MOST_HELD]
        try:
            while self._held:
                with self._database.write() as session:
                    record_events(session, self._job, self._held[:_PER_WRITE])
                del self._held[:_PER_WRITE]
        except SQLAlchemyError as error:
            logger.warning(
                "Events held back: %s",
                error,
                extra={"action": "events_held", "job": self._job.id, "count": len(self._held)},
            )

    def flush(self, session: Session) -> None:
        """Write what is held, in the transaction that ends the job."""
        if self._held:
            record_events(session, self._job, self._held)


class Progress:
    """Tells how far an evaluation is, about once a second. `check` raises when the job must end."""

    def __init__(
        self,
        journal: Journal,
        check: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._check = check
        self._monotonic = monotonic
        self._told: tuple[str, int] | None = None
        self._told_at = 0.0

    def report(self, what: str, done: int, total: int) -> None:
        """As `measurement.Report` asks. A new part is told at once."""
        self._check()
        at, state = self._monotonic(), (what, done)
        same_part = self._told is not None and self._told[0] == what
        if state == self._told or (same_part and at - self._told_at < _PROGRESS_SECONDS):
            return
        self._told, self._told_at = state, at
        event = NewEvent(
            f"{what.capitalize()}: {done} of {total}.",
            data={"part": what, "done": done, "total": total},
        )
        self._journal.record([event])


def to_job_events(events: Iterable[Event]) -> list[NewEvent]:
    """The trainer's events as those of the job, in order."""
    return [_to_job_event(event) for event in events]


def _to_job_event(event: Event) -> NewEvent:
    name = event["event"]
    figures = {key: value for key, value in event.items() if key not in ("event", "message")}
    said = str(event["message"]) if event.get("message") else None
    match name:
        case "started":
            words = f"Training on {event.get('examples')} examples, {event.get('steps')} steps."
            return NewEvent(said or words, data=figures)
        case "step":
            step = f"Step {event.get('step')}/{event.get('steps')}"
            return NewEvent(
                f"{step}: training loss {_figure(event.get('loss'))}", type="metrics", data=figures
            )
        case "validation":
            words = f"Epoch {event.get('epoch')}: validation loss {_figure(event.get('loss'))}"
            # The name that OpenAI's metrics have for it: `loss` is a training step's.
            figures["full_valid_loss"] = figures.pop("loss", None)
            return NewEvent(words, type="validation", data=figures)
        case "checkpoint":
            words = f"Checkpoint at step {event.get('step')}."
            return NewEvent(words, type="checkpoint", data=figures)
        case "restarted":
            return NewEvent(said or "The trainer is started again.", level="warn", data=figures)
        case "failed":
            return NewEvent(
                f"The trainer gave up: {said or 'no reason given'}", level="error", data=figures
            )
        case "finished":
            # The probe's figures and the manifest are long; the adapter's row and the job's result
            # have them.
            metrics = event.get("metrics")
            data = {"metrics": metrics} if isinstance(metrics, dict) else {}
            return NewEvent(f"{said or 'Training finished.'} Checking the adapter.", data=data)
        case _:
            return NewEvent(said or f"Trainer: {name}.", data=figures)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "unknown"
