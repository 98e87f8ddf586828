"""Stored chat completions, as OpenAI's client lists, fetches, changes and deletes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session

from feedback import answers
from feedback.errors import BadRequest, NotFound
from feedback.people import Viewer, speaks_for
from feedback.tables import Answer, AnswerKind
from feedback.verdicts import MAX_METADATA_PAIRS
from server.access.keyring import Caller
from server.access.visibility import append_audit
from server.chat.request import Metadata
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession, WriteSession
from server.endpoints.fields import Limit
from server.http import idempotency
from server.views.completions import (
    SentMessage,
    StoredCompletion,
    view_completion,
    view_completions,
    view_sent_messages,
)
from server.views.objects import Deleted, Page, page

router = APIRouter(
    prefix="/v1/chat/completions", tags=["stored completions"], route_class=JsonRoute
)


class MetadataUpdate(Body):
    metadata: Metadata | None


_METADATA_FILTER = {
    "name": "metadata",
    "in": "query",
    "description": "`metadata[key]=value`: completions that have all these pairs.",
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object"},  # of texts; in a query everything is one
}


@router.get("", openapi_extra={"parameters": [_METADATA_FILTER]})
def list_stored(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    model: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> Page[StoredCompletion]:
    """The caller's stored completions; `metadata[key]=value` filters."""
    rows, has_more = answers.list_answers(
        session,
        caller.viewer(),
        model=model,
        metadata=_metadata_filter(request.query_params),
        after=after,
        limit=limit,
        descending=order == "desc",
    )
    return page(view_completions(session, rows), has_more)


@router.get("/{completion_id}")
def get_stored(completion_id: str, caller: CallerDep, session: ReadSession) -> StoredCompletion:
    """One stored completion."""
    return view_completion(session, _get(session, completion_id, caller.viewer()))


@router.post("/{completion_id}")
def update_stored(
    completion_id: str, body: MetadataUpdate, caller: CallerDep, session: WriteSession
) -> StoredCompletion:
    """Replace its metadata."""
    answer = _get(session, completion_id, caller.editor())
    answers.set_metadata(session, answer, body.metadata or {})
    session.flush()
    _note_foreign(session, caller, "answer_changed", answer)
    return view_completion(session, answer)


@router.delete("/{completion_id}")
def delete_stored(completion_id: str, caller: CallerDep, gateway: GatewayDep) -> Deleted:
    """Delete any answer: a chat's, a task's, a text completion's, stored or not.

    With it go its text, its judgements, replies about it that are kept for repetitions, and what is
    left of it in files.
    """
    with gateway.database.write() as session:
        answer = answers.get_answer(session, completion_id, caller.editor())
        _note_foreign(session, caller, "answer_deleted", answer)
        gone = answers.delete_answer(session, answer)
        idempotency.forget(session, gone)
    gateway.remains.forget(gone)
    return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}


@router.get("/{completion_id}/messages")
def list_messages(
    completion_id: str,
    caller: CallerDep,
    session: ReadSession,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> Page[SentMessage]:
    """The messages that the caller sent."""
    rows = view_sent_messages(session, _get(session, completion_id, caller.viewer()))
    if order == "desc":
        rows.reverse()
    if after is not None:
        ids = [row["id"] for row in rows]
        if after not in ids:
            raise BadRequest(
                f"after is {after!r}, which is no message of this completion", param="after"
            )
        rows = rows[ids.index(after) + 1 :]
    return page(rows[:limit], len(rows) > limit)


def _note_foreign(session: Session, caller: Caller, action: str, answer: Answer) -> None:
    """Write down that somebody else's answer was changed or deleted."""
    if not speaks_for(session, caller.editor(), answer.person_id):
        append_audit(session, caller, action, answer.id, person=answer.person_id)


def _get(session: Session, completion_id: str, viewer: Viewer) -> Answer:
    answer = answers.get_answer(session, completion_id, viewer)
    if not answer.stored or answer.kind != AnswerKind.CHAT:
        raise NotFound(
            f"no stored chat completion {completion_id!r} of yours", param="completion_id"
        )
    return answer


def _metadata_filter(query: Mapping[str, str]) -> dict[str, str]:
    """The pairs of `metadata[key]=value`. Raises BadRequest for another form, and for too many."""
    found: dict[str, str] = {}
    for name, value in query.items():
        if name != "metadata" and not name.startswith("metadata["):
            continue
        if not name.endswith("]") or "][" in name:
            raise BadRequest(
                f"found {name[:100]!r}, expected metadata[key]=value", param="metadata"
            )
        found[name[len("metadata[") : -1]] = value
    if len(found) > MAX_METADATA_PAIRS:
        raise BadRequest(
            f"found {len(found)} pairs of metadata to filter by, at most {MAX_METADATA_PAIRS} are "
            "taken: a completion has no more",
            param="metadata",
        )
    return found
