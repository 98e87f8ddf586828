"""`/v1/comparisons`: which of two answers to the same messages is better."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import Field, StrictInt

from feedback.comparisons import NewComparison, compare
from feedback.tables import Preferred
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, GatewayDep
from server.endpoints.feedback import Source, person_of
from server.endpoints.fields import Name
from server.views.verdicts import ComparisonObject, view_comparison

router = APIRouter(prefix="/v1/comparisons", tags=["feedback"], route_class=JsonRoute)

Choice = Annotated[StrictInt, Field(ge=0, le=1_000)]


class ComparisonCreate(Body):
    """One comparison. `preferred` null withdraws it."""

    completion_ids: tuple[str, str] = Field(strict=False)
    choice_indexes: tuple[Choice, Choice] = Field(default=(0, 0), strict=False)
    preferred: Preferred | None = Field(
        strict=False, description="a: the first; b: the second; null withdraws."
    )
    comment: str | None = None
    source: Source = Source()
    user: Name | None = Field(
        default=None, description="With a key for end users: whose comparison it is."
    )
    id: str | None = None


@router.post(
    "",
    status_code=201,
    responses={200: {"model": ComparisonObject, "description": "It stood already."}},
)
def give_comparison(
    body: ComparisonCreate, caller: CallerDep, gateway: GatewayDep, response: Response
) -> ComparisonObject:
    """Say which of two answers is better."""
    new = NewComparison(
        completion_ids=body.completion_ids,
        preferred=body.preferred,
        choice_indexes=body.choice_indexes,
        comment=body.comment,
        source_type=body.source.type,
        source_id=body.source.id,
        client_id=body.id,
    )
    with gateway.database.write() as session:
        row, created = compare(
            session, caller.editor(), new, person_id=person_of(session, caller, body.user)
        )
    response.status_code = 201 if created else 200
    # What it teaches takes reading long texts: not while the write lock is held.
    with gateway.database.read() as session:
        return view_comparison(session, row, body.completion_ids, body.choice_indexes)
