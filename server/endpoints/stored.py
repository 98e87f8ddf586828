"""Stored chat completions, as OpenAI's client lists, fetches, changes and deletes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session

from feedback import answers
from feedback.answers import OURS
from feedback.errors import BadRequest, NotFound
from feedback.tables import Answer, AnswerKind, AnswerText
from server import idempotency
from server.endpoints.bodies import Body, JsonRoute
from server.sessions import CallerDep, ReadSession, WriteSession
from server.wire import Metadata

router = APIRouter(
    prefix="/v1/chat/completions", tags=["stored completions"], route_class=JsonRoute
)

Limit = Annotated[int, Query(ge=1, le=100)]


class MetadataUpdate(Body):
    metadata: Metadata | None


@router.get("")
def list_stored(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    model: str | None = None,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
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
def get_stored(completion_id: str, caller: CallerDep, session: ReadSession) -> dict[str, Any]:
    """One stored completion."""
    answer = _get(session, completion_id, caller)
    return _completion(*next(iter(_with_texts(session, [answer]))))


@router.post("/{completion_id}")
def update_stored(
    completion_id: str, body: MetadataUpdate, caller: CallerDep, session: WriteSession
) -> dict[str, Any]:
    """Replace its metadata."""
    answer = _get(session, completion_id, caller)
    answers.set_metadata(session, answer, body.metadata or {})
    session.flush()
    return _completion(*next(iter(_with_texts(session, [answer]))))


@router.delete("/{completion_id}")
def delete_stored(completion_id: str, caller: CallerDep, session: WriteSession) -> dict[str, Any]:
    """Delete it, its text, its judgements, and replies about it that are kept for repetitions."""
    answers.delete_answer(session, _get(session, completion_id, caller))
    idempotency.forget(session, completion_id)
    return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}


@router.get("/{completion_id}/messages")
def list_messages(
    completion_id: str,
    caller: CallerDep,
    session: ReadSession,
    after: str | None = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "asc",
) -> dict[str, Any]:
    """The messages that the caller sent."""
    text = answers.get_text(session, _get(session, completion_id, caller))
    rows = [
        {"id": f"{completion_id}-{index}", **message}
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


def page(rows: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": rows,
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
        "has_more": has_more,
    }


def _get(session: Session, completion_id: str, caller: CallerDep) -> Answer:
    answer = answers.get_answer(session, completion_id, caller.viewer())
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
) -> dict[str, Any]:
    choices = (text.choices if text is not None else None) or []
    prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": int(answer.started_at.timestamp()),
        "model": answer.release,
        "choices": [
            {
                "logprobs": None,
                **c,
                "finish_reason": c["finish_reason"] or "stop",
                "message": {"refusal": None, **c["message"]},
            }
            for c in choices
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
        "metadata": dict(metadata),
        "tools": text.tools if text is not None else None,
        "request_id": answer.id.partition("-")[2],
        "status": answer.status,
        **{
            name: answer.sampling.get(name)
            for name in ("temperature", "top_p", "seed", "response_format", "tool_choice")
        },
    }


def _metadata_filter(query: Mapping[str, str]) -> dict[str, str]:
    return {
        name[len("metadata[") : -1]: value
        for name, value in query.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
