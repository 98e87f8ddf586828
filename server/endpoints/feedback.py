"""`/v1/feedback`: what people think of an answer or a conversation."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field, StrictInt
from sqlalchemy.orm import Session

from feedback import judgements
from feedback.answers import get_answer
from feedback.errors import Forbidden, NotFound
from feedback.judgements import NewJudgement
from feedback.people import find_or_create_person, speaker_of, speaks_for
from feedback.tables import JudgementKind, SourceType
from server.access.keyring import Caller
from server.access.tokens import Grant, sign
from server.access.visibility import append_audit
from server.endpoints.bodies import Body, JsonRoute, Part
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession, WriteSession
from server.endpoints.fields import Limit, Name
from server.views.objects import Deleted, Page, page
from server.views.verdicts import (
    FeedbackObject,
    FeedbackWithHistory,
    TokenObject,
    view_feedback,
    view_feedback_history,
    view_one_feedback,
    view_token,
)

router = APIRouter(prefix="/v1/feedback", tags=["feedback"], route_class=JsonRoute)


class Source(Part):
    """Who or what passed the verdict; only `human` is a person."""

    type: SourceType = Field(default=SourceType.HUMAN, strict=False)
    id: str = ""


class FeedbackCreate(Body):
    """One verdict. `value` null withdraws it."""

    completion_id: str | None = None
    conversation_id: str | None = None
    choice_index: Annotated[StrictInt, Field(ge=0, le=1_000)] = 0
    kind: JudgementKind = Field(strict=False)
    value: Any = Field(
        description="rating: true or false; stars: 1 to 5; correction: the better answer, as text "
        "or message; comment: text; signal: text, number or boolean; null withdraws."
    )
    name: str = ""
    comment: str | None = None
    reasons: list[str] | None = None
    source: Source = Source()
    user: Name | None = Field(
        default=None,
        description="With a key for end users: whose verdict it is; by default whoever got the "
        "answer. Of no effect on other keys.",
    )
    metadata: dict[str, str] | None = None
    id: str | None = Field(
        default=None, description="The client's own id: the same verdict sent twice counts once."
    )

    def to_judgement(self) -> NewJudgement:
        return NewJudgement(
            kind=self.kind,
            value=self.value,
            completion_id=self.completion_id,
            conversation_id=self.conversation_id,
            choice_index=self.choice_index,
            name=self.name,
            comment=self.comment,
            reasons=self.reasons,
            metadata=self.metadata,
            source_type=self.source.type,
            source_id=self.source.id,
            client_id=self.id,
        )


@router.post(
    "",
    status_code=201,
    responses={200: {"model": FeedbackObject, "description": "It stood already."}},
)
def give_feedback(
    body: FeedbackCreate, caller: CallerDep, gateway: GatewayDep, response: Response
) -> FeedbackObject:
    """Judge an answer, or change or withdraw what was said before."""
    with gateway.database.write() as session:
        viewer, person_id = caller.editor(), person_of(session, caller, body.user)
        if (grant := caller.key.grant) is not None:
            _check_grant(grant, body)
            # The token names the answer; whoever made it saw it.
            viewer, person_id = replace(viewer, sees_all=True), grant.person_id
        row, created = judgements.judge(session, viewer, body.to_judgement(), person_id=person_id)
    response.status_code = 201 if created else 200
    gateway.figures.judgements.of(body.kind, body.source.type).inc()
    # What it teaches takes reading long texts: not while the write lock is held.
    with gateway.database.read() as session:
        return view_one_feedback(session, row)


class TokenCreate(Body):
    """Who may judge which answer, and for how long."""

    completion_id: Name
    expires_in_seconds: Annotated[StrictInt, Field(ge=1, le=2_592_000)]
    user: Name | None = Field(
        default=None,
        description="With a key for end users: whose verdict it will be; by default of whoever got "
        "the answer. Of no effect on other keys.",
    )


@router.post("/tokens", status_code=201)
async def make_token(body: TokenCreate, caller: CallerDep, gateway: GatewayDep) -> TokenObject:
    """A token that judges one answer in the place of a key, for a browser."""
    expires_at = int(time.time()) + body.expires_in_seconds

    def sign_token() -> str:
        with gateway.database.write() as session:
            editor = caller.editor()
            answer = get_answer(session, body.completion_id, editor)
            person_id = person_of(session, caller, body.user)
            if person_id is None:
                person_id = speaker_of(session, editor, answer.person_id)
            grant = Grant(answer.id, person_id, caller.key.id, expires_at)
            return sign(grant, gateway.signing.tokens)

    token = await asyncio.to_thread(sign_token)
    return view_token(token, expires_at)


@router.get("")
def list_feedback(
    caller: CallerDep,
    session: ReadSession,
    completion_id: str | None = None,
    conversation_id: str | None = None,
    kind: JudgementKind | None = None,
    after: str | None = None,
    limit: Limit = 20,
) -> Page[FeedbackObject]:
    """Standing verdicts, newest first."""
    rows, has_more = judgements.list_judgements(
        session,
        caller.viewer(),
        completion_id=completion_id,
        conversation_id=conversation_id,
        kind=kind,
        after=after,
        limit=limit,
    )
    return page(view_feedback(session, rows), has_more)


@router.get("/{judgement_id}")
def get_feedback(judgement_id: str, caller: CallerDep, session: ReadSession) -> FeedbackWithHistory:
    """One verdict with its history and what became of it."""
    row = judgements.get_judgement(session, caller.viewer(), judgement_id)
    grant = caller.key.grant
    if grant is not None and row.answer_id != grant.answer_id:
        raise NotFound(f"no judgement {judgement_id!r} of yours is known", param="id")
    history = judgements.list_judgement_revisions(session, caller.viewer(), judgement_id)
    return view_feedback_history(session, row, history)


@router.delete("/{judgement_id}")
def withdraw_feedback(judgement_id: str, caller: CallerDep, session: WriteSession) -> Deleted:
    """Take a verdict back."""
    row = judgements.withdraw(session, caller.editor(), judgement_id)
    if not speaks_for(session, caller.editor(), row.person_id):
        append_audit(session, caller, "judgement_withdrawn", row.id, person=row.person_id)
    return {"id": row.id, "object": "feedback.deleted", "deleted": True}


def person_of(session: Session, caller: Caller, end_user: str | None) -> str | None:
    """The end user that an application's key names; None leaves it to the rule of `judge`."""
    if end_user is None or not caller.key.end_users or caller.key.header_only:
        return None
    return find_or_create_person(session, caller.key.user, end_user).id


def _check_grant(grant: Grant, body: FeedbackCreate) -> None:
    """Raises Forbidden for anything but the answer of the token."""
    if body.completion_id != grant.answer_id or body.conversation_id is not None:
        raise Forbidden(f"this feedback token judges {grant.answer_id!r} alone")
