"""Comparisons: which of two answers to the same prompt a person finds better.

Owns: the rows of `comparisons` with their history. A pair is kept in sorted order, so that a and b
exchanged is the same pair. Does not own: judgements of single answers (`judgements.py`), whose
turn-taking and visibility it shares.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from feedback.answers import OURS, get_answer, messages_hash
from feedback.db import canonical_json, new_id, now
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.judgements import check_choice, speaks_for, take_turn, touch_answers
from feedback.people import Viewer, speaker_of
from feedback.tables import (
    Answer,
    AnswerKind,
    AnswerStatus,
    AnswerText,
    Comparison,
    ComparisonRevision,
    Preferred,
    SourceType,
)
from feedback.verdicts import check_comment, check_id, check_source

_EXCHANGED = {Preferred.A: Preferred.B, Preferred.B: Preferred.A}


@dataclass(frozen=True, slots=True)
class NewComparison:
    """The comparison that a request asks to record.

    `preferred` None withdraws it. `comment` None keeps the earlier comment as long as `preferred`
    is unchanged.
    """

    completion_ids: tuple[str, str]
    preferred: str | None
    choice_indexes: tuple[int, int] = (0, 0)
    comment: str | None = None
    source_type: str = SourceType.HUMAN
    source_id: str = ""
    client_id: str | None = None


def compare(
    session: Session, viewer: Viewer, new: NewComparison, *, person_id: str | None = None
) -> tuple[Comparison, bool]:
    """Record which of two answers is better: the comparison as it stands, and whether it is new.

    Both answers must be seen by the viewer, finished, stored, different, and answer the same
    messages (of the caller; their releases' system prompts may differ). The row has them in sorted
    order, and `preferred` with them. Whom it counts for, repetition, history and `client_id` are as
    in `judgements.judge`.
    """
    if new.preferred is not None and new.preferred not in frozenset(Preferred):
        words = ", ".join(repr(word.value) for word in Preferred)
        raise BadRequest(f"preferred is one of {words}, found {new.preferred!r}", param="preferred")
    preferred = None if new.preferred is None else Preferred(new.preferred)
    comment = check_comment(new.comment)
    check_source(new.source_type, new.source_id)
    client_id = check_id(new.client_id, "id")
    sides = list(zip(new.completion_ids, new.choice_indexes, strict=True))
    if sides[0] == sides[1]:
        raise BadRequest("an answer cannot be compared with itself", param="completion_ids")
    answers = [get_answer(session, answer_id, viewer) for answer_id, _ in sides]
    for answer, (_, choice_index) in zip(answers, sides, strict=True):
        check_choice(session, answer, choice_index, "choice_indexes")
    _check_same_prompt(session, answers[0], answers[1])
    if sides[1] < sides[0]:
        sides.reverse()
        preferred = _EXCHANGED.get(preferred, preferred) if preferred is not None else None

    (answer_a, choice_a), (answer_b, choice_b) = sides
    if person_id is None:
        owner = next(answer.person_id for answer in answers if answer.id == answer_a)
        person_id = speaker_of(session, viewer, owner)
    take_turn(session, person_id)
    query = select(Comparison).where(
        Comparison.person_id == person_id,
        Comparison.answer_a == answer_a,
        Comparison.choice_a == choice_a,
        Comparison.answer_b == answer_b,
        Comparison.choice_b == choice_b,
        Comparison.source_type == new.source_type,
    )
    if new.source_type != SourceType.HUMAN:  # a person is one, through whatever they say it
        query = query.where(Comparison.source_id == new.source_id)
    comparison = session.scalar(query)
    repeated = _find_said(session, person_id, client_id)
    if repeated is not None:
        if comparison is None or repeated.comparison_id != comparison.id:
            raise Conflict(
                f"the id {client_id!r} was used for another comparison, "
                f"{repeated.comparison_id!r}; give each its own",
                param="id",
            )
        if repeated.preferred == preferred:
            return comparison, False

    created = comparison is None
    if comparison is None:
        if preferred is None:
            raise NotFound("there is no comparison of these answers to withdraw", param="preferred")
        comparison = Comparison(
            id=new_id("comp_"),
            person_id=person_id,
            answer_a=answer_a,
            choice_a=choice_a,
            answer_b=answer_b,
            choice_b=choice_b,
            source_type=new.source_type,
            revision=0,
            created_at=now(),
        )
        session.add(comparison)
    elif comparison.preferred == preferred and comment in (None, comparison.comment):
        return comparison, False
    comparison.source_id = new.source_id
    _say(session, comparison, preferred, comment, key_id=viewer.key_id, client_id=client_id)
    return comparison, created


def withdraw_comparison(session: Session, viewer: Viewer, comparison_id: str) -> Comparison:
    """Take a comparison back; the row stays, with `preferred` None, and so does its history."""
    owner_id = get_comparison(session, viewer, comparison_id).person_id
    take_turn(session, owner_id)
    comparison = get_comparison(session, viewer, comparison_id, fresh=True)
    if comparison.preferred is not None:
        _say(session, comparison, None, None, key_id=viewer.key_id, client_id=None)
    return comparison


def get_comparison(
    session: Session, viewer: Viewer, comparison_id: str, *, fresh: bool = False
) -> Comparison:
    """The comparison as it stands, where `viewer` sees it; NotFound otherwise."""
    statement = select(Comparison).where(Comparison.id == comparison_id, _sees(viewer))
    comparison = session.scalar(statement, execution_options={"populate_existing": fresh})
    if comparison is None:
        raise NotFound(f"no comparison {comparison_id!r} of yours is known", param="id")
    return comparison


def list_comparisons(
    session: Session,
    viewer: Viewer,
    *,
    completion_id: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Comparison], bool]:
    """List standing comparisons, newest first, and say whether there are more.

    `after` is the id of the last one seen.
    """
    statement = select(Comparison).where(_sees(viewer), Comparison.preferred.is_not(None))
    if completion_id is not None:
        statement = statement.where(
            or_(Comparison.answer_a == completion_id, Comparison.answer_b == completion_id)
        )
    if after is not None:
        get_comparison(session, viewer, after)
        statement = statement.where(Comparison.id < after)
    rows = list(session.scalars(statement.order_by(Comparison.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def list_comparison_revisions(
    session: Session, viewer: Viewer, comparison_id: str
) -> list[ComparisonRevision]:
    """All that was said about this pair, oldest first."""
    get_comparison(session, viewer, comparison_id)
    return list(
        session.scalars(
            select(ComparisonRevision)
            .where(ComparisonRevision.comparison_id == comparison_id)
            .order_by(ComparisonRevision.revision)
        )
    )


def _check_same_prompt(session: Session, one: Answer, other: Answer) -> None:
    """Check that two answers can be compared: both answer the same messages with the same tools.

    Raises BadRequest otherwise, and where one is unfinished, no chat answer, or stored without its
    text.
    """
    prompts = []
    for answer in (one, other):
        if answer.status != AnswerStatus.COMPLETE:
            raise BadRequest(
                f"{answer.id!r} is {answer.status}; only finished answers can be compared",
                param="completion_ids",
            )
        text = session.get(AnswerText, answer.id)
        if answer.kind != AnswerKind.CHAT or text is None:
            what = (
                "is not a chat completion" if answer.kind != AnswerKind.CHAT else "was not stored"
            )
            raise BadRequest(f"{answer.id!r} {what} and cannot be compared", param="completion_ids")
        said = messages_hash("", [message for message in text.messages if not message.get(OURS)])
        prompts.append((said, canonical_json(text.tools or [])))
    if prompts[0] != prompts[1]:
        raise BadRequest(
            f"{one.id!r} and {other.id!r} answer different messages; only answers to the same "
            "ones can be compared",
            param="completion_ids",
        )


def _find_said(
    session: Session, person_id: str, client_id: str | None
) -> ComparisonRevision | None:
    """The newest thing that this person said about a pair under `client_id`."""
    if client_id is None:
        return None
    return session.scalar(
        select(ComparisonRevision)
        .join(Comparison, Comparison.id == ComparisonRevision.comparison_id)
        .where(ComparisonRevision.client_id == client_id, Comparison.person_id == person_id)
        .order_by(ComparisonRevision.revision.desc())
        .limit(1)
    )


def _say(
    session: Session,
    comparison: Comparison,
    preferred: Preferred | None,
    comment: str | None,
    *,
    key_id: str | None,
    client_id: str | None,
) -> None:
    """Set the comparison, add the revision, and move both answers."""
    comparison.preferred = preferred
    comparison.comment = comment
    comparison.key_id = key_id
    comparison.client_id = client_id or comparison.client_id
    comparison.revision += 1
    comparison.updated_at = now()
    session.flush()
    session.add(
        ComparisonRevision(
            comparison_id=comparison.id,
            revision=comparison.revision,
            key_id=key_id,
            client_id=client_id,
            preferred=preferred,
            comment=comment,
            at=comparison.updated_at,
        )
    )
    session.flush()
    touch_answers(session, [comparison.answer_a, comparison.answer_b])


def _sees(viewer: Viewer) -> ColumnElement[bool]:
    """Condition on `comparisons`: who made them, and both answers in the viewer's deployments."""
    condition = speaks_for(viewer, Comparison.person_id)
    if viewer.deployments is not None:
        allowed = select(Answer.id).where(Answer.deployment.in_(viewer.deployments))
        condition = condition & Comparison.answer_a.in_(allowed) & Comparison.answer_b.in_(allowed)
    return condition
