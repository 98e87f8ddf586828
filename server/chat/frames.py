"""What gateway and writer say to each other over their socket.

The gateway sends frames: kind, number, length, and so many bytes of JSON. It is told of each group
in a line of JSON (`Report`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import TypeAdapter

from feedback.recording import (
    NOT_DELIVERED,
    EndedAnswer,
    StartedAnswer,
)
from feedback.tables import AnswerStatus

SETUP, STARTED, ENDED, UNDELIVERED = range(4)  #: kinds of frames
FRAME = struct.Struct(">BQI")  #: kind, number (0: nobody waits), bytes that follow


@dataclass(frozen=True, slots=True)
class TakenBack:
    """The end of an answer that its client was not sent after all, recorded as complete or not."""

    id: str


Row = StartedAnswer | EndedAnswer | TakenBack
AnyRow = TypeVar("AnyRow", bound=Row)
started_json = TypeAdapter(StartedAnswer)
ended_json = TypeAdapter(EndedAnswer)


@dataclass(frozen=True, slots=True)
class Setup:
    """The first frame that a writer's process gets."""

    database_url: str
    dead_letters: str
    lock: str | None  #: held while the process lives: whoever follows on this database waits for it
    log_level: str


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one group."""

    numbers: list[int]  #: settled: committed, or refused for good
    kept_numbers: list[int]  #: not committed now, and written later: settled by another report
    error: str | None  #: None: committed
    settled: int  #: rows of the group, waited for or not; not those that were kept before
    committed: int  #: rows since the start
    lost: int  #: rows that went to the dead-letter file since the start
    kept: int  #: rows that wait for a database that is away
    away: bool  #: the last commit did not reach the database
    refers_to_nothing: bool = False  #: refused because what a row refers to is gone


setup_json = TypeAdapter(Setup)
report_json = TypeAdapter(Report)


def as_undelivered(row: AnyRow) -> AnyRow:
    """The row of an answer whose end the client was not sent after all."""
    if isinstance(row, EndedAnswer) and row.status is AnswerStatus.COMPLETE:
        return replace(row, status=AnswerStatus.INTERRUPTED, error_code=NOT_DELIVERED)
    return row


def as_sent_before(row: AnyRow) -> AnyRow:
    """The row of an answer that a writer had, and of which nobody knows whether it is written."""
    if isinstance(row, EndedAnswer) and row.start is not None:
        return replace(row, start_may_be_there=True)
    return row
