"""Fields that the requests and replies of several routes share."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Query
from pydantic import Field

Limit = Annotated[int, Query(ge=1, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Note = Annotated[str, Field(max_length=2000)]
Generation = Annotated[
    int,
    Field(ge=0, lt=2**31, description="Refused with 409 when somebody moved it meanwhile."),
]


def unix(at: datetime | None) -> int | None:
    """Seconds since 1970, as OpenAI's objects have their times."""
    return None if at is None else int(at.timestamp())
