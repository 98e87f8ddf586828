"""What the objects of all replies share: OpenAI's list and deletion, its times, words of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import Field

# Before Python 3.12 pydantic can't read the one of `typing`.
from typing_extensions import TypedDict

T = TypeVar("T", bound=Mapping[str, Any])


class Page(TypedDict, Generic[T]):
    """OpenAI's list object. `after` with `last_id` continues it."""

    object: Literal["list"]
    data: list[T]
    first_id: str | int | None
    last_id: str | int | None
    has_more: bool


class Deleted(TypedDict):
    """What OpenAI answers a deletion with."""

    id: str
    object: str
    deleted: Literal[True]


def page(rows: Sequence[T], has_more: bool) -> Page[T]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": list(rows),
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
        "has_more": has_more,
    }


def one_of(words: type[StrEnum]) -> Any:
    """Describes a text of a row as one of these words; the row's own text is sent as it is."""
    return Field(json_schema_extra={"enum": [word.value for word in words]})


@overload
def unix(at: datetime) -> int: ...
@overload
def unix(at: None) -> None: ...
@overload
def unix(at: datetime | None) -> int | None: ...
def unix(at: datetime | None) -> int | None:
    """Seconds since 1970, as OpenAI's objects have their times."""
    return None if at is None else int(at.timestamp())
