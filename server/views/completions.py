"""Stored chat completions, and the messages that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import ConfigDict, with_config
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from feedback import answers
from feedback.answers import OURS, text_of
from feedback.tables import Answer, AnswerStatus, AnswerText
from server.views.objects import one_of, unix


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


def view_completions(session: Session, rows: Sequence[Answer]) -> list[StoredCompletion]:
    """Stored completions with their texts and metadata."""
    pairs = answers.get_metadata(session, [row.id for row in rows])
    return [_view(row, session.get(AnswerText, row.id), pairs[row.id]) for row in rows]


def view_completion(session: Session, row: Answer) -> StoredCompletion:
    """One stored completion."""
    (shown,) = view_completions(session, [row])
    return shown


def view_sent_messages(session: Session, row: Answer) -> list[SentMessage]:
    """The messages that the caller sent; what the gateway put before them is left out."""
    sent = [m for m in answers.get_text(session, row).messages if not m.get(OURS)]
    return [
        cast(SentMessage, {"id": f"{row.id}-{index}", **_sent(message)})
        for index, message in enumerate(sent)
    ]


def _sent(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """As OpenAI shows a message: its text, and apart from it the parts that it was sent in."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": text_of(parts), "content_parts": parts}


def _view(answer: Answer, text: AnswerText | None, metadata: Mapping[str, str]) -> StoredCompletion:
    choices = (text.choices if text is not None else None) or []
    sampling = answer.sampling
    prompt, completion = answer.prompt_tokens or 0, answer.completion_tokens or 0
    return {
        "id": answer.id,
        "object": "chat.completion",
        "created": unix(answer.started_at),
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
