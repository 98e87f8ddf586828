"""What every reader of a file yields, the limits that it keeps, and how it gives up."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_COLUMNS = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is accepted of one file."""

    bytes: int = 512 * 1024 * 1024  #: of the rows that come of it
    rows: int = 1_000_000
    row_bytes: int = 4 * 1024 * 1024  #: of one record, and of one row that comes of it
    #: of all rows of one record: each answer of a chat is a row with all that came before it
    record_bytes: int = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands; `problem` where it could not be read."""

    place: str  #: "line 7", "row 3"
    value: Mapping[str, Any]
    problem: str | None = None


class Unreadable(Exception):
    """Nothing can be read from here on; the message says why."""

    def __init__(self, place: str | None, reason: str) -> None:
        super().__init__(reason)
        self.place = place
        self.reason = reason


def find_twice(names: list[str]) -> str | None:
    """The first name that stands a second time; None where all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def describe_too_long(limits: Limits) -> str:
    """Why a record that passes `row_bytes` is refused."""
    return f"it has more than {limits.row_bytes} bytes"


def describe_columns(found: int) -> str:
    """Why a table with so many columns is refused."""
    return f"it has {found} columns, and at most {MOST_COLUMNS} are read"


def is_of_machine(error: OSError) -> bool:
    """Whether the disk or the system is at fault; else it is what the file made a reader do.

    EINVAL is a place before the file's beginning, EFBIG the limit on what is written; libraries
    give what is wrong with a file no number.
    """
    return error.errno not in (None, errno.EINVAL, errno.EFBIG)
