"""Makes a small record as the gateway would: people who ask, and the answers that they got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from feedback.answers import (
    OURS,
    continuation_hash,
    find_earlier,
    messages_hash,
    root_hash,
)
from feedback.curation.policy import Policy
from feedback.db import Driver, new_id
from feedback.people import Viewer, find_or_create_person
from feedback.recording import EndedAnswer, StartedAnswer, record_ended, record_started
from feedback.tables import AnswerKind, AnswerStatus

ALL_TRAIN = Policy(holdout_share=0.0)


def make_viewer(session: Session, user: str, end_user: str = "", **rights: Any) -> Viewer:
    """The view of `user`'s key, or of the end user inside it."""
    person = find_or_create_person(session, user, end_user)
    return Viewer(user=user, person_id=person.id, key_id=f"key_{user}", **rights)


def ask(
    session: Session,
    viewer: Viewer,
    question: str = "What is rain?",
    reply: str | Sequence[str] = "Water that falls from clouds.",
    *,
    history: Sequence[Mapping[str, Any]] = (),
    system: str | None = None,
    deployment: str | None = "assistant",
    status: AnswerStatus | None = AnswerStatus.COMPLETE,
    finish_reason: str = "stop",
    answer_id: str | None = None,
    external_id: str | None = None,
    stored: bool = True,
    **fields: Any,
) -> str:
    """Record a question of `viewer`'s person and its answer; the answer's id.

    `system` is the release's own prompt. `status` None leaves the answer `started`.
    """
    messages = [*map(dict, history), {"role": "user", "content": question}]
    continuation = continuation_hash(viewer.person_id, messages)
    ours = [{"role": "system", "content": system, OURS: True}] if system is not None else []
    replies = [reply] if isinstance(reply, str) else list(reply)
    started = StartedAnswer(
        **{
            "id": answer_id or new_id("chatcmpl-"),
            "person_id": viewer.person_id,
            "key_id": viewer.key_id,
            "deployment": deployment,
            "release": f"{deployment}@0" if deployment else "base",
            "requested_model": deployment or "base",
            "arm": "production",
            "propensity": 1.0,
            "generation": 0,
            "engine": None,
            "gateway": "gw_1",
            "kind": AnswerKind.CHAT,
            "messages": [*ours, *messages],
            "prefix_hash": messages_hash(viewer.person_id, messages),
            "root_hash": root_hash(messages),
            "sampling": {"n": len(replies)},
            "template_hash": "template",
            "external_conversation_id": external_id,
            "earlier": find_earlier(
                session, viewer.person_id, continuation=continuation, external_id=external_id
            ),
            "stored": stored,
            **fields,
        }
    )
    record_started(Driver.of(session), [started])
    if status is not None:
        end(session, started, messages, replies, status, finish_reason)
    return started.id


def end(
    session: Session,
    started: StartedAnswer,
    messages: list[dict[str, Any]],
    replies: Sequence[str],
    status: AnswerStatus = AnswerStatus.COMPLETE,
    finish_reason: str = "stop",
) -> None:
    """Record the end of `started`."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish_reason,
        }
        for index, text in enumerate(replies)
    ]
    record_ended(
        Driver.of(session),
        [
            EndedAnswer(
                id=started.id,
                status=status,
                choices=choices,
                hashes=[
                    messages_hash(started.person_id, [*messages, choice["message"]])
                    for choice in choices
                ],
                stored=started.stored,
                prompt_tokens=12,
                completion_tokens=7,
            )
        ],
    )


def turns(*texts: str) -> list[dict[str, Any]]:
    """Messages of user and assistant by turns."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(texts)
    ]
