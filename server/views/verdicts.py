"""Verdicts: feedback with what it teaches and became, comparisons, and tokens to give them with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, Literal

from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from feedback.curation.policy import Policy
from feedback.curation.teaching import describe_all
from feedback.datasets import what_became
from feedback.tables import (
    Comparison,
    Judgement,
    JudgementKind,
    JudgementRevision,
    Person,
    Preferred,
    SourceType,
)
from server.views.objects import one_of, unix
from tuner.policies import curation_policy
from tuner.tables import Deployment

_EXCHANGED = {Preferred.A: Preferred.B, Preferred.B: Preferred.A}


class SourceObject(TypedDict):
    type: Annotated[str, one_of(SourceType)]
    id: str


class FeedbackObject(TypedDict):
    """A verdict as it stands."""

    id: str
    object: Literal["feedback"]
    completion_id: str | None
    conversation_id: str | None
    choice_index: int
    kind: Annotated[str, one_of(JudgementKind)]
    value: Any
    name: str
    comment: str | None
    reasons: list[str]
    source: SourceObject
    user: str
    metadata: dict[str, str]
    revision: int
    teaches: str
    created_at: int
    updated_at: int


class RevisionObject(TypedDict):
    """What was said at one time."""

    revision: int
    value: Any
    comment: str | None
    reasons: list[str]
    at: int


class FeedbackWithHistory(FeedbackObject):
    """A verdict, what was said before, and what became of it."""

    became: dict[str, list[dict[str, Any]]]  # examples, datasets, drops
    history: list[RevisionObject]


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


class TokenObject(TypedDict):
    """A feedback token. This reply alone shows it."""

    object: Literal["feedback.token"]
    token: str
    expires_at: int


def view_feedback(session: Session, rows: Sequence[Judgement]) -> list[FeedbackObject]:
    """Verdicts as they stand."""
    teachings = _describe_teachings(session, rows)
    return [_view(session, row, teachings[row.id]) for row in rows]


def view_one_feedback(session: Session, row: Judgement) -> FeedbackObject:
    """A verdict as it stands."""
    (shown,) = view_feedback(session, [row])
    return shown


def view_feedback_history(
    session: Session, row: Judgement, history: Sequence[JudgementRevision]
) -> FeedbackWithHistory:
    """A verdict, what was said before, and what became of it."""
    return {
        **view_one_feedback(session, row),
        "became": what_became(session, row.id),
        "history": [
            {
                "revision": said.revision,
                "value": said.value,
                "comment": said.comment,
                "reasons": said.reasons,
                "at": unix(said.at),
            }
            for said in history
        ],
    }


def view_comparison(
    session: Session,
    row: Comparison,
    completion_ids: tuple[str, str],
    choice_indexes: tuple[int, int],
) -> ComparisonObject:
    """A comparison with its two answers in the given order; the row has its own."""
    preferred = None if row.preferred is None else Preferred(row.preferred)
    turned = (row.answer_a, row.choice_a) != (completion_ids[0], choice_indexes[0])
    if turned and preferred is not None:
        preferred = _EXCHANGED.get(preferred, preferred)
    return {
        "id": row.id,
        "object": "comparison",
        "completion_ids": completion_ids,
        "choice_indexes": choice_indexes,
        "preferred": preferred,
        "comment": row.comment,
        "source": {"type": row.source_type, "id": row.source_id},
        "user": _user_of(session, row.person_id),
        "revision": row.revision,
        "teaches": _describe_teachings(session, [row])[row.id],
        "created_at": unix(row.created_at),
        "updated_at": unix(row.updated_at),
    }


def view_token(token: str, expires_at: int) -> TokenObject:
    """A token as the one reply shows it that does."""
    return {"object": "feedback.token", "token": token, "expires_at": expires_at}


def _view(session: Session, row: Judgement, teaches: str) -> FeedbackObject:
    return {
        "id": row.id,
        "object": "feedback",
        "completion_id": row.answer_id,
        "conversation_id": row.conversation_id,
        "choice_index": row.choice_index,
        "kind": row.kind,
        "value": row.value,
        "name": row.name,
        "comment": row.comment,
        "reasons": row.reasons,
        "source": {"type": row.source_type, "id": row.source_id},
        "user": _user_of(session, row.person_id),
        "metadata": row.metadata_,
        "revision": row.revision,
        "teaches": teaches,
        "created_at": unix(row.created_at),
        "updated_at": unix(row.updated_at),
    }


def _user_of(session: Session, person_id: str) -> str:
    """The person's name as the caller knows it: the end user's name, else the key's user."""
    person = session.get_one(Person, person_id)
    return person.end_user or person.user


def _describe_teachings(
    session: Session, verdicts: Sequence[Judgement | Comparison]
) -> dict[str, str]:
    """What each verdict teaches, in words, by its id."""

    @cache
    def find_policy(deployment: str) -> Policy:
        return curation_policy(session.get(Deployment, deployment))

    return describe_all(session, verdicts, find_policy)
