"""Tables of the record.

The text of conversations lives in `answer_texts`, `judgements`, `judgement_revisions`,
`comparisons`, `comparison_revisions` and `extractions`; every other table refers to it by
identifier, so that erasing a person is a matter of these few.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ForeignKey, Index, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from feedback.db import Base, CanonicalJson, JsonInOrder, UtcDateTime, now


class AnswerStatus(StrEnum):
    STARTED = "started"  #: recorded, the engine is asked
    COMPLETE = "complete"  #: the client was sent the end
    INTERRUPTED = "interrupted"  #: the client or the engine went away; the text is partial
    FAILED = "failed"  #: no answer was made


class AnswerKind(StrEnum):
    CHAT = "chat"  #: /v1/chat/completions
    TEXT = "text"  #: /v1/completions
    TASK = "task"  #: a front end's own call (titles, tags); never curated
    INTERNAL = "internal"  #: the worker's evaluations; never curated


class Arm(StrEnum):
    """Why this release answered."""

    PRODUCTION = "production"
    CANARY = "canary"
    PINNED = "pinned"  #: the caller named a release
    BASE = "base"  #: the caller named the base model


class JudgementKind(StrEnum):
    RATING = "rating"  #: true or false
    STARS = "stars"  #: 1 to 5
    CORRECTION = "correction"  #: the better answer
    COMMENT = "comment"  #: free text
    SIGNAL = "signal"  #: something that happened: regenerated, copied, a team's own


class SourceType(StrEnum):
    HUMAN = "human"  #: the only one that counts as a person
    JUDGE = "judge"  #: a model
    CODE = "code"  #: a program


class Preferred(StrEnum):
    A = "a"
    B = "b"
    TIE = "tie"
    BOTH_BAD = "both_bad"


class DatasetStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"


class Person(Base):
    """Whoever a judgement counts for: a key's user, or an end user inside an application's key."""

    __tablename__ = "people"
    __table_args__ = (UniqueConstraint("user", "end_user"),)

    id: Mapped[str] = mapped_column(primary_key=True)  #: person_…
    user: Mapped[str]
    end_user: Mapped[str] = mapped_column(default="")  #: empty: the key's user
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Conversation(Base):
    """Turns that belong together."""

    __tablename__ = "conversations"
    __table_args__ = (UniqueConstraint("person_id", "external_id"),)

    id: Mapped[str] = mapped_column(primary_key=True)  #: conv_…
    person_id: Mapped[str] = mapped_column(ForeignKey("people.id", ondelete="CASCADE"))
    external_id: Mapped[str | None]  #: the client's own name for it
    root_hash: Mapped[str]  #: of the normalised first user turn: decides the side of the split
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Answer(Base):
    """One stored request and what was answered."""

    __tablename__ = "answers"
    __table_args__ = (
        Index("ix_answers_person_id_id", "person_id", "id"),
        Index("ix_answers_deployment_id", "deployment", "id"),
        Index("ix_answers_conversation_id_id", "conversation_id", "id"),
        Index("ix_answers_prefix_hash", "prefix_hash", "id"),
        # Of those alone that have begun and not ended: every answer comes and goes.
        Index(
            "ix_answers_started",
            "gateway",
            sqlite_where=text("status = 'started'"),
            postgresql_where=text("status = 'started'"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)  #: the id that the client received
    person_id: Mapped[str] = mapped_column(ForeignKey("people.id", ondelete="CASCADE"))
    key_id: Mapped[str | None]
    deployment: Mapped[str | None]  #: None: the base model by its own name
    release: Mapped[str]  #: `assistant@7`, or the base model's name
    requested_model: Mapped[str]
    arm: Mapped[str]
    propensity: Mapped[float] = mapped_column(default=1.0)  #: probability of this arm when routed
    generation: Mapped[int] = mapped_column(default=0)  #: of the deployment, when routed
    engine: Mapped[str | None]
    gateway: Mapped[str]  #: which gateway process answered
    kind: Mapped[str]
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    parent_id: Mapped[str | None]  #: the answer before it in the conversation
    regenerates_id: Mapped[str | None]  #: the earlier answer to the same messages
    prefix_hash: Mapped[str]  #: of (person, messages as the caller sent them)
    stored: Mapped[bool] = mapped_column(default=True)  #: text is kept
    trainable: Mapped[bool] = mapped_column(default=True)
    template_hash: Mapped[str | None]  #: of the chat template that rendered the prompt
    sampling: Mapped[dict[str, Any]] = mapped_column(
        CanonicalJson, default=dict
    )  #: what the engine was told
    status: Mapped[str] = mapped_column(default=AnswerStatus.STARTED)
    error_code: Mapped[str | None]
    prompt_tokens: Mapped[int | None]
    completion_tokens: Mapped[int | None]
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    first_token_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revision: Mapped[int] = mapped_column(
        default=0
    )  #: moves with every judgement; keys the curation cache


class AnswerText(Base):
    """What was said: the engine's messages (ours marked), tools, choices, reasoning."""

    __tablename__ = "answer_texts"

    answer_id: Mapped[str] = mapped_column(
        ForeignKey("answers.id", ondelete="CASCADE"), primary_key=True
    )
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JsonInOrder)
    tools: Mapped[list[dict[str, Any]] | None] = mapped_column(JsonInOrder)
    choices: Mapped[list[dict[str, Any]] | None] = mapped_column(
        CanonicalJson
    )  #: index, message, finish_reason, and stop_reason where a text of `stop` ended it
    reasoning: Mapped[list[str | None] | None] = mapped_column(CanonicalJson)  #: one per choice


class AnswerMetadata(Base):
    """The request's `metadata`, one row a pair."""

    __tablename__ = "answer_metadata"
    __table_args__ = (Index("ix_answer_metadata_key_value", "key", "value"),)

    answer_id: Mapped[str] = mapped_column(
        ForeignKey("answers.id", ondelete="CASCADE"), primary_key=True
    )
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class AnswerContinuation(Base):
    """Hash of (person, messages, one choice): a request that begins so continues this answer."""

    __tablename__ = "answer_continuations"
    __table_args__ = (Index("ix_answer_continuations_hash", "hash", "answer_id"),)

    answer_id: Mapped[str] = mapped_column(
        ForeignKey("answers.id", ondelete="CASCADE"), primary_key=True
    )
    choice_index: Mapped[int] = mapped_column(primary_key=True)
    hash: Mapped[str]


class Judgement(Base):
    """A verdict as it stands now; `judgement_revisions` keeps what it was."""

    __tablename__ = "judgements"
    __table_args__ = (
        UniqueConstraint(
            "target_id",
            "choice_index",
            "kind",
            "name",
            "source_type",
            "source_id",
            "person_id",
            name="uq_judgements_target",
        ),
        # Of a person one, whatever the caller calls the source.
        Index(
            "uq_judgements_human",
            "target_id",
            "choice_index",
            "kind",
            "name",
            "person_id",
            unique=True,
            sqlite_where=text("source_type = 'human'"),
            postgresql_where=text("source_type = 'human'"),
        ),
        UniqueConstraint("person_id", "client_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)  #: fb_…
    person_id: Mapped[str] = mapped_column(ForeignKey("people.id", ondelete="CASCADE"), index=True)
    key_id: Mapped[str | None]
    target_id: Mapped[str] = mapped_column(index=True)  #: `answer_id` or `conversation_id`
    answer_id: Mapped[str | None] = mapped_column(
        ForeignKey("answers.id", ondelete="CASCADE"), index=True
    )
    conversation_id: Mapped[str | None] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE"), index=True
    )
    choice_index: Mapped[int] = mapped_column(default=0)
    kind: Mapped[str]
    name: Mapped[str] = mapped_column(default="")
    source_type: Mapped[str] = mapped_column(default=SourceType.HUMAN)
    source_id: Mapped[str] = mapped_column(default="")
    value: Mapped[Any | None] = mapped_column(CanonicalJson)  #: None: withdrawn
    comment: Mapped[str | None] = mapped_column(Text)
    reasons: Mapped[list[str]] = mapped_column(CanonicalJson, default=list)
    metadata_: Mapped[dict[str, str]] = mapped_column("metadata", CanonicalJson, default=dict)
    client_id: Mapped[str | None]  #: the newest `id` given by the client; revisions keep them all
    revision: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class JudgementRevision(Base):
    """One thing that was said, in the order it was said."""

    __tablename__ = "judgement_revisions"

    judgement_id: Mapped[str] = mapped_column(
        ForeignKey("judgements.id", ondelete="CASCADE"), primary_key=True
    )
    revision: Mapped[int] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    client_id: Mapped[str | None] = mapped_column(index=True)
    value: Mapped[Any | None] = mapped_column(CanonicalJson)
    comment: Mapped[str | None] = mapped_column(Text)
    reasons: Mapped[list[str]] = mapped_column(CanonicalJson, default=list)
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Comparison(Base):
    """Which of two answers to the same prompt is better. The pair is kept in sorted order."""

    __tablename__ = "comparisons"
    __table_args__ = (
        UniqueConstraint(
            "person_id",
            "answer_a",
            "choice_a",
            "answer_b",
            "choice_b",
            "source_type",
            "source_id",
            name="uq_comparisons_pair",
        ),
        # Of a person one, whatever the caller calls the source.
        Index(
            "uq_comparisons_human",
            "person_id",
            "answer_a",
            "choice_a",
            "answer_b",
            "choice_b",
            unique=True,
            sqlite_where=text("source_type = 'human'"),
            postgresql_where=text("source_type = 'human'"),
        ),
        UniqueConstraint("person_id", "client_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)  #: comp_…
    person_id: Mapped[str] = mapped_column(ForeignKey("people.id", ondelete="CASCADE"), index=True)
    key_id: Mapped[str | None]
    answer_a: Mapped[str] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"), index=True)
    choice_a: Mapped[int] = mapped_column(default=0)
    answer_b: Mapped[str] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"), index=True)
    choice_b: Mapped[int] = mapped_column(default=0)
    preferred: Mapped[str | None]  #: None: withdrawn
    comment: Mapped[str | None] = mapped_column(Text)
    source_type: Mapped[str] = mapped_column(default=SourceType.HUMAN)
    source_id: Mapped[str] = mapped_column(default="")
    client_id: Mapped[str | None]
    revision: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class ComparisonRevision(Base):
    """One thing that was said about a pair."""

    __tablename__ = "comparison_revisions"

    comparison_id: Mapped[str] = mapped_column(
        ForeignKey("comparisons.id", ondelete="CASCADE"), primary_key=True
    )
    revision: Mapped[int] = mapped_column(primary_key=True)
    key_id: Mapped[str | None]
    client_id: Mapped[str | None] = mapped_column(index=True)
    preferred: Mapped[str | None]
    comment: Mapped[str | None] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class Extraction(Base):
    """What `curation.extract` made of one answer under one policy, at one revision."""

    __tablename__ = "extractions"

    answer_id: Mapped[str] = mapped_column(
        ForeignKey("answers.id", ondelete="CASCADE"), primary_key=True
    )
    policy_hash: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]  #: of the answer
    examples: Mapped[list[dict[str, Any]]] = mapped_column(JsonInOrder)
    drops: Mapped[list[dict[str, Any]]] = mapped_column(CanonicalJson)


class Dataset(Base):
    """Frozen examples. Immutable once ready."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(primary_key=True)  #: ds_…
    deployment: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(default=DatasetStatus.QUEUED)
    error: Mapped[str | None] = mapped_column(Text)
    policy: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)
    policy_hash: Mapped[str | None]
    counts: Mapped[dict[str, int]] = mapped_column(CanonicalJson, default=dict)
    dropped: Mapped[dict[str, int]] = mapped_column(CanonicalJson, default=dict)
    content_hash: Mapped[str | None]
    job_id: Mapped[str | None]
    created_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    ready_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class DatasetRow(Base):
    """Which judged answer became which example: the link that `explain` and erasure follow."""

    __tablename__ = "dataset_rows"

    dataset_id: Mapped[str] = mapped_column(
        ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True
    )
    example_id: Mapped[str] = mapped_column(primary_key=True)  #: ex_…
    kind: Mapped[str]
    side: Mapped[str]  #: train or holdout
    answer_id: Mapped[str | None] = mapped_column(index=True)
    person_id: Mapped[str | None] = mapped_column(index=True)
    judgement_id: Mapped[str | None] = mapped_column(index=True)  #: fb_… or comp_…


class File(Base):
    """A file of the API: a part of a data set, or an upload."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)  #: file-…
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(default="fine-tune")
    bytes: Mapped[int]
    sha256: Mapped[str]
    path: Mapped[str]  #: below the data directory
    rows: Mapped[int]
    kind: Mapped[str | None]  #: supervised, preference or labelled
    side: Mapped[str | None]
    dialect: Mapped[str] = mapped_column(default="trl")  #: trl or openai
    dataset_id: Mapped[str | None] = mapped_column(
        ForeignKey("datasets.id", ondelete="CASCADE"), index=True
    )
    person_id: Mapped[str | None] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)


class AuditEntry(Base):
    """Who did what. Append-only; each entry's hash covers the one before."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str]  #: a key's user, or `worker`, `gateway`
    key_id: Mapped[str | None]
    #: who made that key, and the key of that one, and so on: `user`, `key_id`
    made_by: Mapped[list[dict[str, str | None]] | None] = mapped_column(CanonicalJson)
    action: Mapped[str]
    subject: Mapped[str] = mapped_column(index=True)
    details: Mapped[dict[str, Any]] = mapped_column(CanonicalJson, default=dict)
    previous_hash: Mapped[str]
    #: the name of the key that `hash` was made with; None: of none, as in earlier versions
    signed_by: Mapped[str | None]
    hash: Mapped[str]
