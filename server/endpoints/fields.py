"""Fields that the requests of several routes share."""

from __future__ import annotations

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
WaitSeconds = Annotated[
    float, Field(ge=0, le=600, description="How long the reply may wait for the work's end.")
]
