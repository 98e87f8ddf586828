"""`/v1/comparisons`: which of two answers to the same messages is better."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Response
from pydantic import Field, StrictInt
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from feedback.comparisons import NewComparison, compare
from feedback.tables import Comparison, Preferred
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, GatewayDep
from server.endpoints.feedback import Source, SourceObject, describe_teachings, person_of, user_of
from server.endpoints.fields import Name, one_of, unix

router = APIRouter(prefix="/v1/comparisons", tags=["feedback"], route_class=JsonRoute)

Choice = Annotated[StrictInt, Field(ge=0, le=1_000)]

_EXCHANGED = {Preferred.A: Preferred.B, Preferred.B: Preferred.A}


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


class ComparisonObject(TypedDict):
    """A comparison as it stands, in the order of the request."""

    id: str
    object: Literal["comparison"]
    completion_ids: tuple[str, str]
    choice_indexes: tuple[int, int]
    preferred: Annotated[str, one_of(Preferred)] | None
    comment: str | None
    source: SourceObject
    user: str
    revision: int
    teaches: str
    created_at: int
    updated_at: int


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
        return _comparison(session, row, body)


def _comparison(session: Session, row: Comparison, body: ComparisonCreate) -> ComparisonObject:
    """In the order of the request; the row has its own."""
    preferred = None if row.preferred is None else Preferred(row.preferred)
    turned = (row.answer_a, row.choice_a) != (body.completion_ids[0], body.choice_indexes[0])
    if turned and preferred is not None:
        preferred = _EXCHANGED.get(preferred, preferred)
    return {
        "id": row.id,
        "object": "comparison",
        "completion_ids": body.completion_ids,
        "choice_indexes": body.choice_indexes,
        "preferred": preferred,
        "comment": row.comment,
        "source": {"type": row.source_type, "id": row.source_id},
        "user": user_of(session, row.person_id),
        "revision": row.revision,
        "teaches": describe_teachings(session, [row])[row.id],
        "created_at": unix(row.created_at),
        "updated_at": unix(row.updated_at),
    }
