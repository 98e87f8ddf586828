"""Judged answers as curation sees them: rows with all that was said about them, read in pages.

Owns: which answers of a deployment are judged, and their facts with verdicts and comparisons. Does
not own what they teach (`extract.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from feedback.curation.examples import (
    AnswerFacts,
    ComparedVerdict,
    Drop,
    DropReason,
    JudgedAnswer,
    Verdict,
)
from feedback.tables import (
    Answer,
    AnswerStatus,
    AnswerText,
    Comparison,
    Conversation,
    Judgement,
    Preferred,
    SourceType,
)


@dataclass(frozen=True, slots=True)
class Moved:
    """An answer about which something was said, and its revision."""

    answer_id: str
    revision: int
    ended: bool  #: its row changes no more but by what is said about it


def list_moved(
    session: Session, deployment: str, *, after: str | None = None, limit: int
) -> list[Moved]:
    """Judged answers of a deployment in the order of their ids, from behind `after`."""
    statement = select(Answer.id, Answer.revision, Answer.status).where(
        Answer.deployment == deployment, Answer.revision > 0
    )
    if after is not None:
        statement = statement.where(Answer.id > after)
    rows = session.execute(statement.order_by(Answer.id).limit(limit))
    return [
        Moved(answer_id, revision, status != AnswerStatus.STARTED)
        for answer_id, revision, status in rows
    ]


def read_judged(session: Session, answer_ids: Collection[str]) -> list[JudgedAnswer]:
    """The answers with their verdicts and comparisons, withdrawn ones too, by id."""
    if not answer_ids:
        return []
    compared = _read_comparisons(session, answer_ids)
    sides = {answer_id for comparison in compared for answer_id in _answers_of(comparison)}
    facts = _read_facts(session, {*answer_ids, *sides})
    verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
    for judgement in session.scalars(
        select(Judgement).where(Judgement.answer_id.in_(answer_ids)).order_by(Judgement.id)
    ):
        verdicts[judgement.target_id].append(_to_verdict(judgement))
    comparisons: defaultdict[str, list[ComparedVerdict]] = defaultdict(list)
    for comparison in compared:
        for side in (Preferred.A, Preferred.B):
            told = _see_from(comparison, side, facts)
            comparisons[_answers_of(comparison)[side == Preferred.B]].append(told)
    return [
        JudgedAnswer(facts[answer_id], tuple(verdicts[answer_id]), tuple(comparisons[answer_id]))
        for answer_id in sorted(answer_ids)
        if answer_id in facts
    ]


def read_alone(
    session: Session, verdicts: Sequence[Judgement | Comparison]
) -> dict[str, list[JudgedAnswer]]:
    """The answers that each verdict is about, with nothing else said about them; by its id."""
    about = {
        verdict.id: (verdict.answer_id,) if isinstance(verdict, Judgement) else _answers_of(verdict)
        for verdict in verdicts
    }
    facts = _read_facts(
        session, {answer_id for ids in about.values() for answer_id in ids if answer_id is not None}
    )
    alone: dict[str, list[JudgedAnswer]] = {}
    for verdict in verdicts:
        if isinstance(verdict, Comparison):
            alone[verdict.id] = [
                JudgedAnswer(facts[answer_id], (), (_see_from(verdict, side, facts),))
                for side, answer_id in zip(
                    (Preferred.A, Preferred.B), _answers_of(verdict), strict=True
                )
            ]
        elif verdict.answer_id is not None:
            alone[verdict.id] = [JudgedAnswer(facts[verdict.answer_id], (_to_verdict(verdict),))]
    return alone


def list_conversation_drops(
    session: Session, deployment: str, *, after: str | None = None, limit: int
) -> list[Drop]:
    """Verdicts on whole conversations of a deployment, in the order of their ids: none teaches."""
    of_deployment = select(Answer.conversation_id).where(
        Answer.conversation_id == Judgement.conversation_id, Answer.deployment == deployment
    )
    statement = select(Judgement).where(
        Judgement.conversation_id.is_not(None), of_deployment.exists()
    )
    if after is not None:
        statement = statement.where(Judgement.id > after)
    rows = session.scalars(statement.order_by(Judgement.id).limit(limit))
    return [drop_of_conversation(judgement) for judgement in rows]


def drop_of_conversation(judgement: Judgement) -> Drop:
    """Why a verdict on a whole conversation teaches nothing."""
    if judgement.value is None:
        reason = DropReason.WITHDRAWN
    elif judgement.source_type != SourceType.HUMAN:
        reason = DropReason.NOT_HUMAN
    else:
        reason = DropReason.WHOLE_CONVERSATION
    return Drop(None, judgement.id, reason)


def _read_comparisons(session: Session, answer_ids: Collection[str]) -> Sequence[Comparison]:
    statement = select(Comparison).where(
        or_(Comparison.answer_a.in_(answer_ids), Comparison.answer_b.in_(answer_ids))
    )
    return session.scalars(statement.order_by(Comparison.id)).all()


def _answers_of(comparison: Comparison) -> tuple[str, str]:
    return comparison.answer_a, comparison.answer_b


def _read_facts(session: Session, answer_ids: Collection[str]) -> dict[str, AnswerFacts]:
    rows = session.execute(
        select(
            Answer.id,
            Answer.deployment,
            Answer.kind,
            Answer.status,
            Answer.stored,
            Answer.trainable,
            Answer.template_hash,
            Answer.prompt_tokens,
            Answer.sampling,
            Answer.started_at,
            Conversation.root_hash,
            AnswerText.messages,
            AnswerText.tools,
            AnswerText.choices,
        )
        .join(Conversation, Conversation.id == Answer.conversation_id)
        .outerjoin(AnswerText, AnswerText.answer_id == Answer.id)
        .where(Answer.id.in_(answer_ids))
    )
    return {
        row.id: AnswerFacts(
            id=row.id,
            deployment=row.deployment,
            kind=row.kind,
            status=row.status,
            stored=row.stored,
            trainable=row.trainable,
            root_hash=row.root_hash,
            messages=tuple(row.messages or ()),
            tools=tuple(row.tools or ()),
            choices=tuple(row.choices or ()),
            template_hash=row.template_hash,
            prompt_tokens=row.prompt_tokens,
            template_kwargs=_template_kwargs(row.sampling),
            served_at=row.started_at.isoformat(timespec="seconds"),
        )
        for row in rows
    }


def _template_kwargs(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine gave its chat template for a request with this sampling."""
    effort = sampling.get("reasoning_effort")
    thinks = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return {**({} if effort is None else thinks), **(sampling.get("chat_template_kwargs") or {})}


def _to_verdict(judgement: Judgement) -> Verdict:
    return Verdict(
        id=judgement.id,
        person_id=judgement.person_id,
        kind=judgement.kind,
        value=judgement.value,
        judged_at=judgement.updated_at,
        choice_index=judgement.choice_index,
        source_type=judgement.source_type,
    )


def _see_from(
    comparison: Comparison, side: Preferred, facts: dict[str, AnswerFacts]
) -> ComparedVerdict:
    own, other = (comparison.choice_a, comparison.choice_b), _answers_of(comparison)
    at = 0 if side == Preferred.A else 1
    return ComparedVerdict(
        id=comparison.id,
        person_id=comparison.person_id,
        side=side,
        preferred=comparison.preferred,
        choice_index=own[at],
        other=facts[other[1 - at]],
        other_choice_index=own[1 - at],
        judged_at=comparison.updated_at,
        source_type=comparison.source_type,
    )
