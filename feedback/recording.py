"""Records answers: rows for many requests at once, in as few statements as there are tables.

Owns: how an answer begins and ends in the database, and which conversation it is put into. An
answer whose beginning nobody saw (a plain one) comes as one row, at its end. Every answer pays for
these statements, so they are written out and run by the driver: what SQLAlchemy does around a
statement took two thirds of a group's time. Does not own: when groups are committed
(`server/chat/writer.py`), who reads answers (`answers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from feedback.answers import EarlierAnswer
from feedback.db import Driver, canonical_json, json_in_order, new_id, now
from feedback.tables import (
    Answer,
    AnswerContinuation,
    AnswerMetadata,
    AnswerStatus,
    AnswerText,
    Conversation,
)

NOT_DELIVERED = "not_delivered"
"""The error code of an answer whose end the client was not sent after all."""

NOT_RECORDED = "not_recorded"
"""The error code of an answer that could not be written as it was."""

GATEWAY_STOPPED = "gateway_stopped"
"""The error code of an answer that its gateway left `started`, and somebody else ended."""


@dataclass(slots=True)
class StartedAnswer:
    """A request that an engine is asked; the fields are those of `Answer`."""

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
    root_hash: str  #: of the messages: a new conversation gets it
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
    """How an answer ended; `choices` are OpenAI's `{index, message, finish_reason}`, by index.

    One that a text of the request's `stop` ended has that as `stop_reason`.

    `hashes` name the conversation up to each choice (`MessagesHash`): the next turn finds it so.
    """

    id: str
    status: AnswerStatus
    choices: list[dict[str, Any]]
    hashes: list[str] = field(default_factory=list)
    reasoning: list[str | None] | None = None
    stored: bool = True
    error_code: str | None = None
    engine: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_at: datetime | None = None
    ended_at: datetime = field(default_factory=now)
    start: StartedAnswer | None = None  #: None: it is recorded
    start_may_be_there: bool = False  #: it was sent before, and nobody knows what became of it

    def says_only(self, error_code: str) -> bool:
        """Whether it has nothing but a failure of that code."""
        return (self.status, self.error_code, self.choices) == (
            AnswerStatus.FAILED,
            error_code,
            [],
        )


def record_started(
    driver: Driver,
    batch: Sequence[StartedAnswer],
    ends: Mapping[str, EndedAnswer] = MappingProxyType({}),
) -> None:
    """Insert `batch`, each in its conversation, as `started` or as what `ends` says by id."""
    answers: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    conversations: list[dict[str, Any]] = []
    same_prefix = _find_same_prefix(driver, batch)
    named = _find_or_create_named(driver, batch)
    known = _lock_conversations(driver, batch, same_prefix, named)
    for item in batch:
        before = same_prefix.get((item.person_id, item.prefix_hash))
        conversation_id = named.get((item.person_id, item.external_conversation_id or ""))
        if conversation_id is None and item.external_conversation_id is None:
            if item.earlier is not None:
                conversation_id = item.earlier.conversation_id
            elif before is not None:
                conversation_id = before[1]
        if conversation_id not in known:  # it is new, or was deleted meanwhile
            new = _conversation_values(driver, item)
            conversation_id = new["id"]
            known.add(conversation_id)
            conversations.append(new)
        regenerates = before[0] if before is not None and before[1] == conversation_id else None
        same_prefix[item.person_id, item.prefix_hash] = (item.id, conversation_id)
        end = ends.get(item.id)
        values = _answer_values(driver, item, conversation_id, regenerates)
        answers.append(values if end is None else values | _end_values(driver, end))
        if item.stored:
            tools = None if item.tools is None else json_in_order(item.tools)
            texts.append(
                {
                    "answer_id": item.id,
                    "messages": json_in_order(item.messages),
                    "tools": tools,
                    **_NOTHING_SAID,
                    **({} if end is None else _said_values(end)),
                }
            )
            pairs += [
                {"answer_id": item.id, "key": k, "value": v} for k, v in item.metadata.items()
            ]
    driver.insert(Conversation, conversations)
    # A connection that broke during COMMIT may still commit what was sent again meanwhile.
    again = any(end.start_may_be_there for end in ends.values())
    driver.insert(Answer, answers, unless_there=again)
    driver.insert(AnswerText, texts, unless_there=again)
    driver.insert(AnswerMetadata, pairs, unless_there=again)
    _insert_continuations(driver, ends.values(), unless_there=again)


_NOTHING_SAID = {"choices": None, "reasoning": None}


def _said_values(item: EndedAnswer) -> dict[str, Any]:
    return {
        "choices": canonical_json(item.choices),
        "reasoning": None if item.reasoning is None else canonical_json(item.reasoning),
    }


def _end_values(driver: Driver, item: EndedAnswer) -> dict[str, Any]:
    return {
        "status": item.status.value,
        "error_code": item.error_code,
        "engine": item.engine,
        "prompt_tokens": item.prompt_tokens,
        "completion_tokens": item.completion_tokens,
        "first_token_at": driver.time(item.first_token_at),
        "ended_at": driver.time(item.ended_at),
    }


def _insert_continuations(
    driver: Driver, batch: Iterable[EndedAnswer], *, unless_there: bool = False
) -> None:
    driver.insert(
        AnswerContinuation,
        [
            {"answer_id": item.id, "choice_index": choice["index"], "hash": name}
            for item in batch
            if item.stored
            for choice, name in zip(item.choices, item.hashes, strict=True)
        ],
        unless_there=unless_there,
    )


def _conversation_values(driver: Driver, item: StartedAnswer) -> dict[str, Any]:
    return {
        "id": new_id("conv_"),
        "person_id": item.person_id,
        "external_id": item.external_conversation_id,
        "root_hash": item.root_hash,
        "created_at": driver.time(item.started_at),
    }


def _answer_values(
    driver: Driver, item: StartedAnswer, conversation_id: str, regenerates: str | None
) -> dict[str, Any]:
    return {
        "id": item.id,
        "person_id": item.person_id,
        "key_id": item.key_id,
        "deployment": item.deployment,
        "release": item.release,
        "requested_model": item.requested_model,
        "arm": str(item.arm),
        "propensity": item.propensity,
        "generation": item.generation,
        "engine": item.engine,
        "gateway": item.gateway,
        "kind": str(item.kind),
        "conversation_id": conversation_id,
        "parent_id": item.earlier.id if item.earlier is not None else None,
        "regenerates_id": regenerates,
        "prefix_hash": item.prefix_hash,
        "stored": item.stored,
        "trainable": item.trainable,
        "template_hash": item.template_hash,
        "sampling": canonical_json(item.sampling if item.stored else _numbers_of(item.sampling)),
        "status": AnswerStatus.STARTED.value,
        "error_code": None,
        "prompt_tokens": None,
        "completion_tokens": None,
        "started_at": driver.time(item.started_at),
        "first_token_at": None,
        "ended_at": None,
        "revision": 0,
    }


def _numbers_of(sampling: dict[str, Any]) -> dict[str, Any]:
    """Without what may hold somebody's words: stop texts, schemas, names of tools."""
    return {name: value for name, value in sampling.items() if isinstance(value, int | float)}


def record_ended(driver: Driver, batch: Sequence[EndedAnswer]) -> None:
    """Write how the answers of `batch` ended, and that they began where that isn't recorded.

    An answer that has ended before stays as it is, but for one that was ended as a stopped
    gateway's: this end proves that its gateway lives.
    """
    there = _find_there(driver, [item.id for item in batch if item.start_may_be_there])
    whole = {
        item.id: item for item in reversed(batch) if item.start is not None and item.id not in there
    }
    if whole:
        record_started(driver, [item.start for item in whole.values() if item.start], whole)
        batch = [item for item in batch if item.id not in whole]
    if not batch:
        return
    awaited = _find_awaited(driver, [item.id for item in batch])
    ending = {item.id: item for item in reversed(batch) if item.id in awaited}
    driver.run(
        "UPDATE answers SET status = ?, error_code = ?, engine = ?, prompt_tokens = ?, "
        "completion_tokens = ?, first_token_at = ?, ended_at = ? WHERE id = ?",
        [(*_end_values(driver, item).values(), item.id) for item in ending.values()],
    )
    # What was extracted from a judged one while it counted as interrupted holds no longer.
    driver.run(
        "UPDATE answers SET revision = revision + 1 WHERE id = ? AND revision > 0",
        [(name,) for name, status in awaited.items() if status != AnswerStatus.STARTED],
    )
    kept = [item for item in ending.values() if item.stored]
    driver.run(
        "UPDATE answer_texts SET choices = ?, reasoning = ? WHERE answer_id = ?",
        [(*_said_values(item).values(), item.id) for item in kept],
    )
    _insert_continuations(driver, kept)


def record_undelivered(driver: Driver, answer_ids: Iterable[str]) -> None:
    """Answers recorded as complete whose end was not sent after all: interrupted."""
    answer_ids = sorted(set(answer_ids))
    if not driver.is_sqlite:
        # A connection that broke during COMMIT may still commit: its transaction is waited for.
        marks = ", ".join("?" * len(answer_ids))
        driver.rows(
            f"SELECT id FROM answers WHERE id IN ({marks}) ORDER BY id FOR UPDATE",
            tuple(answer_ids),
        )
    driver.run(
        "UPDATE answers SET status = ?, error_code = ?, "
        "revision = CASE WHEN revision > 0 THEN revision + 1 ELSE 0 END "
        "WHERE id = ? AND status = ?",
        [
            (AnswerStatus.INTERRUPTED.value, NOT_DELIVERED, answer_id, AnswerStatus.COMPLETE.value)
            for answer_id in answer_ids
        ],
    )


def interrupt_started(session: Session, gateway: str | None = None) -> int:
    """Mark answers that a stopped gateway left `started` as interrupted; the number of them.

    `gateway` limits it to that gateway's own; None: all, where there is one gateway only.
    """
    left = select(Answer.id).where(text("status = 'started'"))  # in the index's own words
    if gateway is not None:
        left = left.where(Answer.gateway == gateway)
    # A row that is locked is being ended by its own gateway. PostgreSQL would have one of the two
    # fail where each waited for the other; SQLite has one writer at a time.
    leftovers = left.with_for_update(skip_locked=True).cte("leftovers")
    result = session.execute(
        update(Answer)
        .where(Answer.id.in_(select(leftovers.c.id)))
        .values(status=AnswerStatus.INTERRUPTED, error_code=GATEWAY_STOPPED, ended_at=now())
        .execution_options(synchronize_session=False)
    )
    return int(getattr(result, "rowcount", 0))


def _find_same_prefix(
    driver: Driver, batch: Sequence[StartedAnswer]
) -> dict[tuple[str, str], tuple[str, str]]:
    """(person, prefix hash) → (answer, conversation) of the newest answer to the same messages."""
    # One index seek for each, however often the same was asked before.
    found = {}
    for prefix in sorted({item.prefix_hash for item in batch}):
        for person, answer, conversation in driver.rows(
            "SELECT person_id, id, conversation_id FROM answers WHERE prefix_hash = ? "
            "ORDER BY id DESC LIMIT 1",
            (prefix,),
        ):
            found[person, prefix] = (answer, conversation)
    return found


def _find_or_create_named(
    driver: Driver, batch: Sequence[StartedAnswer]
) -> dict[tuple[str, str], str]:
    """(person, the client's name for a conversation) → the conversation."""
    items = {
        (item.person_id, item.external_conversation_id): item
        for item in reversed(batch)
        if item.external_conversation_id is not None
    }
    found = _find_named(driver, items)
    # In one order: two gateways that meet the same new ones wait for each other, and not both ways.
    missing = sorted(items.keys() - found.keys())
    new = [_conversation_values(driver, items[name]) for name in missing]
    driver.insert(Conversation, new, unless_there=True)
    if driver.is_sqlite:  # nobody else can have made one
        made = {name: row["id"] for name, row in zip(missing, new, strict=True)}
    else:
        made = _find_named(driver, missing)
    return found | made


def _find_named(driver: Driver, names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    found = {}
    for person, name in names:
        for (conversation,) in driver.rows(
            "SELECT id FROM conversations WHERE person_id = ? AND external_id = ?", (person, name)
        ):
            found[person, name] = conversation
    return found


def _lock_conversations(
    driver: Driver,
    batch: Sequence[StartedAnswer],
    same_prefix: dict[tuple[str, str], tuple[str, str]],
    named: dict[tuple[str, str], str],
) -> set[str]:
    """Those conversations that answers may go on with and that are still there.

    On PostgreSQL they are there until the transaction ends.
    """
    ids = {item.earlier.conversation_id for item in batch if item.earlier is not None}
    ids.update(conversation for _, conversation in same_prefix.values())
    ids.update(named.values())
    if not ids:
        return set()
    lock = "" if driver.is_sqlite else " ORDER BY id FOR KEY SHARE"
    marks = ", ".join("?" * len(ids))
    statement = f"SELECT id FROM conversations WHERE id IN ({marks}){lock}"
    return {conversation for (conversation,) in driver.rows(statement, tuple(sorted(ids)))}


def _find_there(driver: Driver, ids: Sequence[str]) -> set[str]:
    """Those of `ids` that have a row."""
    if not ids:
        return set()
    marks = ", ".join("?" * len(ids))
    found = driver.rows(f"SELECT id FROM answers WHERE id IN ({marks})", tuple(ids))
    return {name for (name,) in found}


def _find_awaited(driver: Driver, ids: Sequence[str]) -> dict[str, str]:
    """Those of `ids` whose end is to be written, with their status.

    On PostgreSQL they are locked, in the order of their ids.
    """
    lock = "" if driver.is_sqlite else " ORDER BY id FOR UPDATE"
    marks = ", ".join("?" * len(ids))
    found = driver.rows(
        "SELECT id, status FROM answers "
        f"WHERE (status = ? OR error_code = ?) AND id IN ({marks}){lock}",
        (AnswerStatus.STARTED.value, GATEWAY_STOPPED, *ids),
    )
    return dict(found)
