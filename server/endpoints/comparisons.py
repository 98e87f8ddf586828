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

    def to_comparison(self) -> NewComparison:
        return NewComparison(
            completion_ids=self.completion_ids,
            preferred=self.preferred,
            choice_indexes=self.choice_indexes,
            comment=self.comment,
            source_type=self.source.type,
            source_id=self.source.id,
            client_id=self.id,
        )


@router.post(
    "",
    status_code=201,
    responses={200: {"model": ComparisonObject, "description": "It stood already."}},
)
def give_comparison(
    body: ComparisonCreate, caller: CallerDep, gateway: GatewayDep, response: Response
) -> ComparisonObject:
    """Say which of two answers is better."""
    with gateway.database.write() as session:
        person_id = person_of(session, caller, body.user)
        row, created = compare(session, caller.editor(), body.to_comparison(), person_id=person_id)
    response.status_code = 201 if created else 200
    # What it teaches takes reading long texts: not while the write lock is held.
    with gateway.database.read() as session:
        return view_comparison(session, row, body.completion_ids, body.choice_indexes)
