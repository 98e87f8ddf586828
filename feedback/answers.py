"""Answers: which conversation they belong to, who may read and delete them.

Owns: the hashes by which a conversation is found, stored completions as OpenAI's API lists them.
Does not own: how answers come into the database (`recording.py`), judgements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from feedback.canonical import canonical_json, json_of_text
from feedback.errors import NotFound
from feedback.formats.messages import texts_of
from feedback.normal_form import normalise
from feedback.people import Viewer
from feedback.tables import (
    Answer,
    AnswerContinuation,
    AnswerKind,
    AnswerMetadata,
    AnswerStatus,
    AnswerText,
    Comparison,
    Conversation,
    Extraction,
)

Message = Mapping[str, Any]

OURS = "burnish"
"""Mark on a message that the gateway added (a release's system prompt). No engine gets it."""


@dataclass(frozen=True, slots=True)
class EarlierAnswer:
    """The answer that a request continues."""

    id: str
    conversation_id: str
    deployment: str | None
    release: str


def text_of(content: Any) -> str:
    """The text of a message's `content`: a string, or parts with a line break between their texts.

    Engines join the parts in the same way.
    """
    return "\n".join(texts_of(content))


class MessagesHash:
    """Names the beginning of a conversation: sha256 over person and what was said, 32 hex digits.

    Only role, text, tool calls and tool results count, outer white space does not: clients send
    their history back with other fields than they received.
    """

    __slots__ = ("_digest",)

    def __init__(self, person_id: str, messages: Iterable[Message] = ()) -> None:
        self._digest = hashlib.sha256(person_id.encode())
        for message in messages:
            self._add(message)

    def after(self, message: Message) -> str:
        """The hash with one more message; this one stays as it is."""
        longer = MessagesHash.__new__(MessagesHash)
        longer._digest = self._digest.copy()
        longer._add(message)
        return str(longer)

    def __str__(self) -> str:
        return self._digest.hexdigest()[:32]

    def _add(self, message: Message) -> None:
        said = _line_of(message)
        self._digest.update(said.encode("utf-8", "surrogatepass"))


def _line_of(message: Message) -> str:
    """What counts of a message: `[role, text, [[id, name, arguments], …], tool_call_id]`."""
    role, text = message.get("role"), text_of(message.get("content")).strip()
    calls, answered = message.get("tool_calls"), message.get("tool_call_id")
    if not calls and answered is None and isinstance(role, str):  # nearly all are of this form
        return f"[{json_of_text(role)},{json_of_text(text)},[],null]"
    named = [
        [
            call.get("id"),
            call.get("function", {}).get("name"),
            call.get("function", {}).get("arguments"),
        ]
        for call in calls or ()
    ]
    return canonical_json([role, text, named, answered])


def messages_hash(person_id: str, messages: Iterable[Message]) -> str:
    """`MessagesHash` of all of `messages`."""
    return str(MessagesHash(person_id, messages))


def root_hash(messages: Iterable[Message]) -> str:
    """Names a conversation by its first user turn; 32 hex digits.

    The turn is normalised first: case-folded, NFKC, white space collapsed. The side of the split
    depends on this hash, so a changed space moves nothing from training to the holdout.
    """
    first = next((text_of(m.get("content")) for m in messages if m.get("role") == "user"), "")
    return hashlib.sha256(normalise(first).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def continuation_hash(person_id: str, messages: Sequence[Message]) -> str | None:
    """Hash of `messages` up to its last assistant turn, None where nobody has answered yet."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].get("role") == "assistant":
            return messages_hash(person_id, messages[: index + 1])
    return None


def find_earlier(
    session: Session, person_id: str, *, continuation: str | None, external_id: str | None
) -> EarlierAnswer | None:
    """The newest answer that a request continues: by its messages, else by the client's name."""
    columns = (Answer.id, Answer.conversation_id, Answer.deployment, Answer.release)
    row = None
    if continuation is not None:
        row = session.execute(
            select(*columns)
            .join(AnswerContinuation, AnswerContinuation.answer_id == Answer.id)
            .where(AnswerContinuation.hash == continuation, Answer.person_id == person_id)
            .order_by(AnswerContinuation.answer_id.desc())
            .limit(1)
        ).first()
    if row is None and continuation is not None and external_id is not None:
        row = session.execute(
            select(*columns)
            .join(Conversation, Conversation.id == Answer.conversation_id)
            .where(Conversation.person_id == person_id, Conversation.external_id == external_id)
            .order_by(Answer.id.desc())
            .limit(1)
        ).first()
    return None if row is None else EarlierAnswer(*row)


def was_answered(session: Session, person_id: str, prefix_hash: str) -> bool:
    """Whether the same messages of the same person were answered before: a regeneration."""
    found = session.scalar(
        select(Answer.id)
        .where(
            Answer.prefix_hash == prefix_hash,
            Answer.person_id == person_id,
            Answer.status == AnswerStatus.COMPLETE,
        )
        .limit(1)
    )
    return found is not None


def get_answer(session: Session, answer_id: str, viewer: Viewer) -> Answer:
    """The answer, where `viewer` sees it; NotFound otherwise."""
    answer = session.scalar(select(Answer).where(Answer.id == answer_id, viewer.sees()))
    if answer is None:
        raise NotFound(f"no answer {answer_id!r} of yours is stored", param="completion_id")
    return answer


def get_text(session: Session, answer: Answer) -> AnswerText:
    """What was said; NotFound where the caller asked for `store: false`."""
    text = session.get(AnswerText, answer.id)
    if text is None:
        raise NotFound(f"the text of {answer.id!r} was not stored")
    return text


def get_metadata(session: Session, answer_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """The metadata of several answers, by answer."""
    found: dict[str, dict[str, str]] = {answer_id: {} for answer_id in answer_ids}
    for row in session.scalars(
        select(AnswerMetadata).where(AnswerMetadata.answer_id.in_(answer_ids))
    ):
        found[row.answer_id][row.key] = row.value
    return found


def list_answers(
    session: Session,
    viewer: Viewer,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int = 20,
    descending: bool = False,
) -> tuple[list[Answer], bool]:
    """Stored chat completions in order of time, and whether there are more.

    `model` is a deployment, a release or the name that was asked for. Raises NotFound for an
    unknown `after`.
    """
    statement = select(Answer).where(viewer.sees(), Answer.stored, Answer.kind == AnswerKind.CHAT)
    statement = statement.where(Answer.status != AnswerStatus.STARTED)
    if model is not None:
        statement = statement.where(
            or_(
                Answer.release == model, Answer.deployment == model, Answer.requested_model == model
            )
        )
    for key, value in (metadata or {}).items():
        pair = select(AnswerMetadata.answer_id).where(
            AnswerMetadata.key == key, AnswerMetadata.value == value
        )
        statement = statement.where(Answer.id.in_(pair))
    if after is not None:
        get_answer(session, after, viewer)
        statement = statement.where(Answer.id < after if descending else Answer.id > after)
    order = Answer.id.desc() if descending else Answer.id.asc()
    rows = list(session.scalars(statement.order_by(order).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def set_metadata(session: Session, answer: Answer, metadata: Mapping[str, str]) -> None:
    """Replace the answer's metadata."""
    session.execute(delete(AnswerMetadata).where(AnswerMetadata.answer_id == answer.id))
    session.add_all(
        AnswerMetadata(answer_id=answer.id, key=k, value=v) for k, v in metadata.items()
    )


def delete_answer(session: Session, answer: Answer) -> set[str]:
    """Remove the answer, its text, what was said about it, and its conversation when that is empty.

    Returns the ids of what is gone: the answer's, and the conversation's if it is.

    What curation made of answers that it was compared with holds its text too and goes with it.
    """
    # First of all, as the recorder does: who goes on with the conversation meanwhile keeps it.
    session.execute(
        select(Conversation.id).where(Conversation.id == answer.conversation_id).with_for_update()
    )
    compared = session.execute(
        select(Comparison.answer_a, Comparison.answer_b).where(
            or_(Comparison.answer_a == answer.id, Comparison.answer_b == answer.id)
        )
    )
    others = {other for pair in compared for other in pair} - {answer.id}
    for other in sorted(others):
        session.execute(
            update(Answer).where(Answer.id == other).values(revision=Answer.revision + 1)
        )
        session.execute(delete(Extraction).where(Extraction.answer_id == other))
    session.execute(delete(Answer).where(Answer.id == answer.id))
    empty = session.execute(
        delete(Conversation)
        .where(
            Conversation.id == answer.conversation_id,
            ~select(Answer.id).where(Answer.conversation_id == Conversation.id).exists(),
        )
        .returning(Conversation.id)
    )
    return {answer.id, *empty.scalars()}
