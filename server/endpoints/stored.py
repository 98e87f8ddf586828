"""Stored chat completions, as OpenAI's client lists, fetches, changes and deletes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Request
from pydantic import ConfigDict, with_config
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from feedback import answers
from feedback.answers import OURS, text_of
from feedback.errors import BadRequest, NotFound
from feedback.people import Viewer, speaks_for
from feedback.tables import Answer, AnswerKind, AnswerStatus, AnswerText
from feedback.verdicts import MAX_METADATA_PAIRS
from server.access.keyring import Caller
from server.access.visibility import append_audit
from server.chat.request import Metadata
from server.endpoints.bodies import Body, JsonRoute
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession, WriteSession
from server.endpoints.fields import Deleted, Limit, Page, one_of, page
from server.http import idempotency

router = APIRouter(
    prefix="/v1/chat/completions", tags=["stored completions"], route_class=JsonRoute
)


class MetadataUpdate(Body):
    metadata: Metadata | None


class StoredMessage(TypedDict):
    """An answer's message, as OpenAI has it."""

    role: str
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[dict[str, Any]]]


class StoredChoice(TypedDict):
    index: int
    message: StoredMessage
    finish_reason: str
    logprobs: None  # they are not kept


class StoredUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StoredCompletion(TypedDict):
    """A stored chat completion; `status` is ours: OpenAI keeps complete ones only."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[StoredChoice]
    usage: StoredUsage
    metadata: dict[str, str]
    tools: list[dict[str, Any]] | None
    request_id: str
    status: Annotated[str, one_of(AnswerStatus)]
    temperature: float | None
    top_p: float | None
    seed: int | None
    response_format: dict[str, Any] | None
    tool_choice: str | dict[str, Any] | None


@with_config(ConfigDict(extra="allow"))
class SentMessage(TypedDict):
    """A message as the caller sent it, with an id of ours; further fields are the caller's."""

    id: str
    role: str
    content: NotRequired[Any]
    content_parts: NotRequired[list[dict[str, Any]]]  # where it was sent in parts


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
    return page([_completion(*item) for item in _with_texts(session, rows)], has_more)


@router.get("/{completion_id}")
def get_stored(completion_id: str, caller: CallerDep, session: ReadSession) -> StoredCompletion:
    """One stored completion."""
    answer = _get(session, completion_id, caller.viewer())
    return _completion(*next(iter(_with_texts(session, [answer]))))


@router.post("/{completion_id}")
def update_stored(
    completion_id: str, body: MetadataUpdate, caller: CallerDep, session: WriteSession
) -> StoredCompletion:
    """Replace its metadata."""
    answer = _get(session, completion_id, caller.editor())
    answers.set_metadata(session, answer, body.metadata or {})
    session.flush()
    _note_foreign(session, caller, "answer_changed", answer)
    return _completion(*next(iter(_with_texts(session, [answer]))))


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


@router.get("/{completion_id}/messages", response_model=Page[SentMessage])
def list_messages(
    completion_id: str,
    caller: CallerDep,
    session: ReadSession,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> Page[dict[str, Any]]:
    """The messages that the caller sent."""
    text = answers.get_text(session, _get(session, completion_id, caller.viewer()))
    rows = [
        {"id": f"{completion_id}-{index}", **_sent(message)}
        for index, message in enumerate(m for m in text.messages if not m.get(OURS))
    ]
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


def _sent(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """As OpenAI shows a message: its text, and apart from it the parts that it was sent in."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": text_of(parts), "content_parts": parts}


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


def _with_texts(
    session: Session, rows: Sequence[Answer]
) -> list[tuple[Answer, AnswerText | None, dict[str, str]]]:
    pairs = answers.get_metadata(session, [row.id for row in rows])
    return [(row, session.get(AnswerText, row.id), pairs[row.id]) for row in rows]


def _completion(
    answer: Answer, text: AnswerText | None, metadata: Mapping[str, str]
) -> StoredCompletion:
    choices = (text.choices if text is not None else None) or []
    sampling = answer.sampling
    prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": int(answer.started_at.timestamp()),
        "model": answer.release,
        "choices": [_choice(choice) for choice in choices],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "metadata": dict(metadata),
        "tools": text.tools if text is not None else None,
        "request_id": answer.id.partition("-")[2],
        "status": answer.status,
        "temperature": sampling.get("temperature"),
        "top_p": sampling.get("top_p"),
        "seed": sampling.get("seed"),
        "response_format": sampling.get("response_format"),
        "tool_choice": sampling.get("tool_choice"),
    }


def _choice(kept: Mapping[str, Any]) -> StoredChoice:
    said = kept["message"]
    message: StoredMessage = {"role": said["role"], "content": said["content"], "refusal": None}
    if "tool_calls" in said:
        message["tool_calls"] = said["tool_calls"]
    return {
        "index": kept["index"],
        "message": message,
        "finish_reason": kept["finish_reason"] or "stop",
        "logprobs": None,
    }


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
