"""Answers: how they are recorded, which conversation they belong to, who may read and delete them.

Owns: the rows of `answers` and their text, the derivation of conversations, stored completions as
OpenAI's API lists them. Statements for many rows at once, for the recorder's groups. Does not own:
the recorder's thread (`server/recorder.py`), judgements.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, delete, insert, or_, select, update
from sqlalchemy.orm import Session

from feedback.db import canonical_json, new_id, now
from feedback.errors import NotFound
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


@dataclass(slots=True)
class StartedAnswer:
    """A request that is about to be sent to an engine; the fields are those of `Answer`."""

    id: str
    person_id: str
    key_id: str | None
    deployment: str | None
    release: str
    requested_model: str
    arm: str
    propensity: float
    generation: int
    engine: str | None
    gateway: str
    kind: str
    messages: list[dict[str, Any]]  #: as the engine gets them, ours marked
    prefix_hash: str
    root_hash: str
    sampling: dict[str, Any]
    template_hash: str | None = None
    tools: list[dict[str, Any]] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    external_conversation_id: str | None = None
    earlier: EarlierAnswer | None = None
    stored: bool = True
    trainable: bool = True
    started_at: datetime = field(default_factory=now)


@dataclass(slots=True)
class EndedAnswer:
    """How an answer ended; `choices` are OpenAI's `{index, message, finish_reason}`, by index."""

    id: str
    person_id: str
    status: AnswerStatus
    choices: list[dict[str, Any]]
    #: the caller's, for the hash by which the next turn finds this answer
    messages: list[dict[str, Any]]
    reasoning: list[str | None] | None = None
    stored: bool = True
    error_code: str | None = None
    engine: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_at: datetime | None = None
    ended_at: datetime = field(default_factory=now)


def text_of(content: Any) -> str:
    """The text of a message's `content`: a string, or a list of parts whose texts are joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    return ""


def messages_hash(person_id: str, messages: Iterable[Message]) -> str:
    """Names the beginning of a conversation: sha256 over person and what was said, 32 hex digits.

    Only role, text, tool calls and tool results count, outer white space does not: clients send
    their history back with other fields than they received.
    """
    digest = hashlib.sha256(person_id.encode())
    for message in messages:
        calls = [
            [
                call.get("id"),
                call.get("function", {}).get("name"),
                call.get("function", {}).get("arguments"),
            ]
            for call in message.get("tool_calls") or ()
        ]
        part = [
            message.get("role"),
            text_of(message.get("content")).strip(),
            calls,
            message.get("tool_call_id"),
        ]
        digest.update(canonical_json(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def root_hash(messages: Iterable[Message]) -> str:
    """Names a conversation by its first user turn; 32 hex digits.

    Case, the form of accents and white space are set apart.
    The side of the split hangs on it, so that rephrasing by a space moves nothing from training to
    the holdout.
    """
    first = next((text_of(m.get("content")) for m in messages if m.get("role") == "user"), "")
    normal = " ".join(unicodedata.normalize("NFKC", first).casefold().split())
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()[:32]


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


# The recorder's statements. Built once, and run on the session's connection, not by the session:
# every answer pays for them, and the ORM's bulk machinery took half of a group's time.

_NEW_CONVERSATION = insert(Conversation)
_NEW_ANSWER = insert(Answer)
_NEW_TEXT = insert(AnswerText)
_NEW_METADATA = insert(AnswerMetadata)
_NEW_CONTINUATION = insert(AnswerContinuation)
_NEWEST_OF_PREFIX = (
    select(Answer.person_id, Answer.id, Answer.conversation_id)
    .where(Answer.prefix_hash == bindparam("prefix"))
    .order_by(Answer.id.desc())
    .limit(1)
)
_AWAITED = (
    select(Answer.id)
    .where(
        Answer.id.in_(bindparam("ids", expanding=True)),
        Answer.status == AnswerStatus.STARTED,
    )
    .order_by(Answer.id)
    .with_for_update()
)
_END = (
    update(Answer)
    .where(Answer.id == bindparam("b_id"))
    .values(
        status=bindparam("b_status"),
        error_code=bindparam("b_error_code"),
        engine=bindparam("b_engine"),
        prompt_tokens=bindparam("b_prompt_tokens"),
        completion_tokens=bindparam("b_completion_tokens"),
        first_token_at=bindparam("b_first_token_at"),
        ended_at=bindparam("b_ended_at"),
    )
)
_END_TEXT = (
    update(AnswerText)
    .where(AnswerText.answer_id == bindparam("b_id"))
    .values(choices=bindparam("b_choices"), reasoning=bindparam("b_reasoning"))
)


def record_started(session: Session, batch: Sequence[StartedAnswer]) -> None:
    """Insert `batch` as `started`, each in its conversation."""
    answers: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    conversations: dict[str, dict[str, Any]] = {}
    same_prefix = _find_same_prefix(session, batch)
    named = _find_named_conversations(session, batch)
    for item in batch:
        before = same_prefix.get((item.person_id, item.prefix_hash))
        conversation_id = named.get((item.person_id, item.external_conversation_id or ""))
        if conversation_id is None and item.external_conversation_id is None:
            if item.earlier is not None:
                conversation_id = item.earlier.conversation_id
            elif before is not None:
                conversation_id = before[1]
        if conversation_id is None:
            conversation_id = new_id("conv_")
            conversations[conversation_id] = {
                "id": conversation_id,
                "person_id": item.person_id,
                "external_id": item.external_conversation_id,
                "root_hash": item.root_hash,
                "created_at": item.started_at,
            }
            if item.external_conversation_id is not None:
                named[item.person_id, item.external_conversation_id] = conversation_id
        regenerates = before[0] if before is not None and before[1] == conversation_id else None
        same_prefix[item.person_id, item.prefix_hash] = (item.id, conversation_id)
        answers.append(_answer_values(item, conversation_id, regenerates))
        if item.stored:
            texts.append(
                {
                    "answer_id": item.id,
                    "messages": item.messages,
                    "tools": item.tools,
                    "choices": None,
                    "reasoning": None,
                }
            )
        pairs.extend({"answer_id": item.id, "key": k, "value": v} for k, v in item.metadata.items())
    connection = session.connection()
    if conversations:
        connection.execute(_NEW_CONVERSATION, list(conversations.values()))
    connection.execute(_NEW_ANSWER, answers)
    if texts:
        connection.execute(_NEW_TEXT, texts)
    if pairs:
        connection.execute(_NEW_METADATA, pairs)


def _answer_values(
    item: StartedAnswer, conversation_id: str, regenerates: str | None
) -> dict[str, Any]:
    return {
        "id": item.id,
        "person_id": item.person_id,
        "key_id": item.key_id,
        "deployment": item.deployment,
        "release": item.release,
        "requested_model": item.requested_model,
        "arm": item.arm,
        "propensity": item.propensity,
        "generation": item.generation,
        "engine": item.engine,
        "gateway": item.gateway,
        "kind": item.kind,
        "conversation_id": conversation_id,
        "parent_id": item.earlier.id if item.earlier is not None else None,
        "regenerates_id": regenerates,
        "prefix_hash": item.prefix_hash,
        "stored": item.stored,
        "trainable": item.trainable,
        "template_hash": item.template_hash,
        "sampling": item.sampling,
        "status": AnswerStatus.STARTED,
        "started_at": item.started_at,
        "revision": 0,
    }


def _find_same_prefix(
    session: Session, batch: Sequence[StartedAnswer]
) -> dict[tuple[str, str], tuple[str, str]]:
    """(person, prefix hash) → (answer, conversation) of the newest answer to the same messages."""
    # One index seek for each, however often the same was asked before.
    connection, found = session.connection(), {}
    for prefix in sorted({item.prefix_hash for item in batch}):
        row = connection.execute(_NEWEST_OF_PREFIX, {"prefix": prefix}).first()
        if row is not None:
            found[row.person_id, prefix] = (row.id, row.conversation_id)
    return found


def _find_named_conversations(
    session: Session, batch: Sequence[StartedAnswer]
) -> dict[tuple[str, str], str]:
    names = {
        item.external_conversation_id for item in batch if item.external_conversation_id is not None
    }
    if not names:
        return {}
    rows = session.execute(
        select(Conversation.person_id, Conversation.external_id, Conversation.id).where(
            Conversation.external_id.in_(names)
        )
    )
    return {(person, name or ""): conversation for person, name, conversation in rows}


def record_ended(session: Session, batch: Sequence[EndedAnswer]) -> None:
    """Write how the answers of `batch` ended.

    An answer that is no longer `started` stays as it is.
    """
    connection = session.connection()
    awaited = set(connection.scalars(_AWAITED, {"ids": [item.id for item in batch]}))
    ending = {item.id: item for item in reversed(batch) if item.id in awaited}
    batch = list(ending.values())
    if not batch:
        return
    connection.execute(
        _END,
        [
            {
                "b_id": item.id,
                "b_status": item.status,
                "b_error_code": item.error_code,
                "b_engine": item.engine,
                "b_prompt_tokens": item.prompt_tokens,
                "b_completion_tokens": item.completion_tokens,
                "b_first_token_at": item.first_token_at,
                "b_ended_at": item.ended_at,
            }
            for item in batch
        ],
    )
    kept = [item for item in batch if item.stored]
    if not kept:
        return
    connection.execute(
        _END_TEXT,
        [
            {"b_id": item.id, "b_choices": item.choices, "b_reasoning": item.reasoning}
            for item in kept
        ],
    )
    continuations = [
        {
            "answer_id": item.id,
            "choice_index": choice["index"],
            "hash": messages_hash(item.person_id, [*item.messages, choice["message"]]),
        }
        for item in kept
        for choice in item.choices
        if "message" in choice
    ]
    if continuations:
        connection.execute(_NEW_CONTINUATION, continuations)


def interrupt_started(session: Session, gateway: str | None = None) -> int:
    """Mark answers that a stopped gateway left `started` as interrupted; the number of them.

    `gateway` limits it to that gateway's own; None: all, where there is one gateway only.
    """
    statement = update(Answer).where(Answer.status == AnswerStatus.STARTED)
    if gateway is not None:
        statement = statement.where(Answer.gateway == gateway)
    result = session.execute(
        statement.values(
            status=AnswerStatus.INTERRUPTED, error_code="gateway_stopped", ended_at=now()
        )
    )
    return int(getattr(result, "rowcount", 0))


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


def delete_answer(session: Session, answer: Answer) -> None:
    """Remove the answer, its text, what was said about it, and its conversation when that is empty.

    What curation made of answers that it was compared with holds its text too and goes with it.
    """
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
    session.execute(
        delete(Conversation).where(
            Conversation.id == answer.conversation_id,
            ~select(Answer.id).where(Answer.conversation_id == Conversation.id).exists(),
        )
    )
