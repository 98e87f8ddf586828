"""Judgements: what a person says about one answer or one conversation.

Owns: the rows of `judgements` with their history, who may judge and see what, and that saying the
same thing twice changes nothing. Does not own: which values are allowed (`verdicts.py`), pairs
(`comparisons.py`), what a verdict teaches (`curation/`).

The verdicts of one person are taken one at a time (a row lock on the person; SQLite has one writer
anyway), so a request that arrives several times at once finds what its first copy wrote. Everything
here that writes needs a write transaction and never commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, or_, select, true, update
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from feedback.answers import get_answer
from feedback.db import canonical_json, new_id, now
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.people import Viewer, speaker_of
from feedback.tables import (
    Answer,
    AnswerStatus,
    AnswerText,
    Conversation,
    Judgement,
    JudgementKind,
    JudgementRevision,
    Person,
    SourceType,
)
from feedback.verdicts import (
    MAX_SIGNALS,
    check_comment,
    check_id,
    check_kind,
    check_metadata,
    check_reasons,
    check_source,
    check_value,
)


@dataclass(frozen=True, slots=True)
class NewJudgement:
    """What a request says. Exactly one of `completion_id` and `conversation_id` is given.

    `comment`, `reasons`, `metadata` left out (None) stay as they are while the value does; a new
    value starts anew.
    """

    kind: str
    value: Any
    completion_id: str | None = None
    conversation_id: str | None = None
    choice_index: int = 0
    name: str = ""
    comment: str | None = None
    reasons: Sequence[str] | None = None
    metadata: Mapping[str, str] | None = None
    source_type: str = SourceType.HUMAN
    source_id: str = ""
    client_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Target:
    """What is judged: the columns that name it, and whose answer it was."""

    answer_id: str | None
    conversation_id: str | None
    owner_id: str

    @property
    def id(self) -> str:
        return self.answer_id or self.conversation_id or ""


def judge(
    session: Session, viewer: Viewer, new: NewJudgement, *, person_id: str | None = None
) -> tuple[Judgement, bool]:
    """Record a verdict; the judgement as it now stands, and whether it is a new one.

    It counts for `person_id`; by default for whoever got the answer where the viewer speaks for
    that person, else for the viewer. There is one judgement per (target, choice, kind, name,
    source type, person), of judges and code also by source id; of signals at most `MAX_SIGNALS`
    names. The same value again changes nothing, another value makes a new revision, None
    withdraws. A `client_id` that was seen before on the same judgement with the same value is a
    repetition and changes nothing even when newer ones came between.

    Raises NotFound for a target that is unknown or somebody else's and for a withdrawal of what was
    never said, BadRequest for values out of bounds, Conflict for a `client_id` that was used for
    another judgement.
    """
    kind = check_kind(new.kind, new.name)
    value = check_value(kind, new.value)
    comment = check_comment(new.comment)
    reasons = check_reasons(new.reasons)
    metadata = check_metadata(new.metadata)
    check_source(new.source_type, new.source_id)
    client_id = check_id(new.client_id, "id")
    target = _find_target(session, viewer, new)
    person_id = person_id or speaker_of(session, viewer, target.owner_id)
    take_turn(session, person_id)

    of_choice = (
        Judgement.target_id == target.id,
        Judgement.choice_index == new.choice_index,
        Judgement.kind == kind,
        Judgement.person_id == person_id,
    )
    query = select(Judgement).where(
        *of_choice, Judgement.name == new.name, Judgement.source_type == new.source_type
    )
    if new.source_type != SourceType.HUMAN:  # a person is one, through whatever they say it
        query = query.where(Judgement.source_id == new.source_id)
    judgement = session.scalar(query)
    repeated = _find_said(session, person_id, client_id)
    if repeated is not None:
        if judgement is None or repeated.judgement_id != judgement.id:
            raise Conflict(
                f"the id {client_id!r} was used for another judgement, "
                f"{repeated.judgement_id!r}; give each its own",
                param="id",
            )
        if _same(repeated.value, value):
            return judgement, False

    created = judgement is None
    if judgement is None:
        if value is None:
            raise NotFound(f"there is no {kind} of {target.id!r} to withdraw", param="value")
        if kind == JudgementKind.SIGNAL:
            _check_signals(session, of_choice, new.name)
        judgement = Judgement(
            id=new_id("fb_"),
            person_id=person_id,
            target_id=target.id,
            answer_id=target.answer_id,
            conversation_id=target.conversation_id,
            choice_index=new.choice_index,
            kind=kind,
            name=new.name,
            source_type=new.source_type,
            revision=0,
            created_at=now(),
        )
        session.add(judgement)
    elif _same(judgement.value, value):
        comment = judgement.comment if comment is None else comment
        reasons = judgement.reasons if reasons is None else reasons
        metadata = judgement.metadata_ if metadata is None else metadata
        if (comment, reasons, metadata) == (
            judgement.comment,
            judgement.reasons,
            judgement.metadata_,
        ):
            return judgement, False
    judgement.source_id = new.source_id
    judgement.metadata_ = metadata or {}
    _say(
        session, judgement, value, comment, reasons or [], key_id=viewer.key_id, client_id=client_id
    )
    return judgement, created


def _check_signals(session: Session, of_choice: Sequence[ColumnElement[bool]], name: str) -> None:
    """Conflict where this person has given this choice as many signals as are kept."""
    given = set(session.scalars(select(Judgement.name).distinct().where(*of_choice)))
    if name not in given and len(given) >= MAX_SIGNALS:
        raise Conflict(
            f"{name!r} would be signal number {len(given) + 1} of this person for this choice, and "
            f"{MAX_SIGNALS} names are kept; use one of these again: {', '.join(sorted(given))}",
            param="name",
            code="too_many_signals",
        )


def withdraw(session: Session, viewer: Viewer, judgement_id: str) -> Judgement:
    """Take a verdict back, whatever its kind; the row stays, with value None, and its history."""
    owner_id = get_judgement(session, viewer, judgement_id).person_id
    take_turn(session, owner_id)
    judgement = get_judgement(session, viewer, judgement_id, fresh=True)
    if judgement.value is not None:
        _say(session, judgement, None, None, [], key_id=viewer.key_id, client_id=None)
    return judgement


def get_judgement(
    session: Session, viewer: Viewer, judgement_id: str, *, fresh: bool = False
) -> Judgement:
    """The judgement as it stands (value None: withdrawn), where `viewer` sees it, else NotFound.

    `fresh` reads it again where the session has it already.
    """
    statement = select(Judgement).where(Judgement.id == judgement_id, _sees(viewer))
    judgement = session.scalar(statement, execution_options={"populate_existing": fresh})
    if judgement is None:
        raise NotFound(f"no judgement {judgement_id!r} of yours is known", param="id")
    return judgement


def list_judgements(
    session: Session,
    viewer: Viewer,
    *,
    completion_id: str | None = None,
    conversation_id: str | None = None,
    kind: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Judgement], bool]:
    """List standing judgements, newest first, and say whether there are more.

    `after` is the id of the last one seen.
    """
    statement = select(Judgement).where(_sees(viewer), Judgement.value.is_not(None))
    if completion_id is not None:
        statement = statement.where(Judgement.answer_id == completion_id)
    if conversation_id is not None:
        statement = statement.where(Judgement.conversation_id == conversation_id)
    if kind is not None:
        statement = statement.where(Judgement.kind == kind)
    if after is not None:
        get_judgement(session, viewer, after)
        statement = statement.where(Judgement.id < after)
    rows = list(session.scalars(statement.order_by(Judgement.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def list_judgement_revisions(
    session: Session, viewer: Viewer, judgement_id: str
) -> list[JudgementRevision]:
    """All that was said in this judgement, oldest first."""
    get_judgement(session, viewer, judgement_id)
    return list(
        session.scalars(
            select(JudgementRevision)
            .where(JudgementRevision.judgement_id == judgement_id)
            .order_by(JudgementRevision.revision)
        )
    )


def take_turn(session: Session, person_id: str) -> None:
    """Wait for, and then hold until the transaction ends, this person's turn to judge.

    Does not hold up the recorder, whose new answers only refer to the person.
    """
    turn = select(Person.id).where(Person.id == person_id).with_for_update(key_share=True)
    if session.scalar(turn) is None:
        raise NotFound(f"no person {person_id!r} is known", param="user")


def touch_answers(session: Session, answer_ids: Iterable[str]) -> None:
    """Advance the revision of answers that were judged.

    They are updated in the order of their ids, so that no two writers deadlock.
    """
    for answer_id in sorted(set(answer_ids)):
        session.execute(
            update(Answer)
            .where(Answer.id == answer_id)
            .values(revision=Answer.revision + 1)
            .execution_options(synchronize_session=False)
        )


def speaks_for(viewer: Viewer, person_id: InstrumentedAttribute[str]) -> ColumnElement[bool]:
    """SQL condition on `person_id` that is true for the people whom the viewer speaks for.

    They are the viewer alone, all end users of the viewer's application, or everybody.
    """
    if viewer.sees_all:
        return true()
    if viewer.speaks_for_many:
        return person_id.in_(select(Person.id).where(Person.user == viewer.user))
    return person_id == viewer.person_id


def check_choice(session: Session, answer: Answer, choice_index: int, param: str) -> None:
    """BadRequest unless the answer has that choice, or may still get it."""
    text = session.get(AnswerText, answer.id) if answer.status == AnswerStatus.COMPLETE else None
    if text is not None and text.choices is not None:
        choices = sorted(choice["index"] for choice in text.choices)
    else:
        choices = list(range(answer.sampling.get("n") or 1))
    if choice_index not in choices:
        there = ", ".join(map(str, choices)) or "none"
        raise BadRequest(
            f"{answer.id!r} has no choice {choice_index}; its choices are {there}", param=param
        )


def _find_target(session: Session, viewer: Viewer, new: NewJudgement) -> _Target:
    if (new.completion_id is None) == (new.conversation_id is None):
        raise BadRequest("give either completion_id or conversation_id", param="completion_id")
    if new.completion_id is not None:
        answer = get_answer(session, new.completion_id, viewer)
        check_choice(session, answer, new.choice_index, "choice_index")
        return _Target(answer_id=answer.id, conversation_id=None, owner_id=answer.person_id)
    seen = select(Answer.conversation_id).where(
        Answer.conversation_id == new.conversation_id,
        viewer.sees(),
        _lies_within(viewer, Answer.conversation_id),
    )
    conversation = session.scalar(select(Conversation).where(Conversation.id.in_(seen)))
    if conversation is None:
        raise NotFound(
            f"no conversation {new.conversation_id!r} of yours is stored", param="conversation_id"
        )
    if new.kind == JudgementKind.CORRECTION:
        raise BadRequest("a correction is of one answer: give completion_id", param="completion_id")
    if new.choice_index != 0:
        raise BadRequest(
            "a conversation has no choices; leave choice_index out", param="choice_index"
        )
    return _Target(answer_id=None, conversation_id=conversation.id, owner_id=conversation.person_id)


def _find_said(session: Session, person_id: str, client_id: str | None) -> JudgementRevision | None:
    """The newest thing that this person said under `client_id`."""
    if client_id is None:
        return None
    return session.scalar(
        select(JudgementRevision)
        .join(Judgement, Judgement.id == JudgementRevision.judgement_id)
        .where(JudgementRevision.client_id == client_id, Judgement.person_id == person_id)
        .order_by(JudgementRevision.revision.desc())
        .limit(1)
    )


def _say(
    session: Session,
    judgement: Judgement,
    value: Any,
    comment: str | None,
    reasons: list[str],
    *,
    key_id: str | None,
    client_id: str | None,
) -> None:
    """Set the judgement, add the revision, and move the answer or conversation judged."""
    judgement.value = value
    judgement.comment = comment
    judgement.reasons = reasons
    judgement.key_id = key_id
    judgement.client_id = client_id or judgement.client_id
    judgement.revision += 1
    judgement.updated_at = now()
    session.flush()
    session.add(
        JudgementRevision(
            judgement_id=judgement.id,
            revision=judgement.revision,
            key_id=key_id,
            client_id=client_id,
            value=value,
            comment=comment,
            reasons=reasons,
            at=judgement.updated_at,
        )
    )
    session.flush()
    if judgement.answer_id is not None:
        touch_answers(session, [judgement.answer_id])


def _sees(viewer: Viewer) -> ColumnElement[bool]:
    """Condition on `judgements`."""
    condition = speaks_for(viewer, Judgement.person_id)
    if viewer.deployments is not None:
        allowed = Answer.deployment.in_(viewer.deployments)
        condition = condition & or_(
            Judgement.answer_id.in_(select(Answer.id).where(allowed)),
            Judgement.conversation_id.is_not(None)
            & _lies_within(viewer, Judgement.conversation_id),
        )
    return condition


def _lies_within(
    viewer: Viewer, conversation_id: InstrumentedAttribute[str] | InstrumentedAttribute[str | None]
) -> ColumnElement[bool]:
    """Condition on the column: no answer of that conversation is outside the viewer's deployments.

    A verdict on a conversation is about all of it.
    """
    if viewer.deployments is None:
        return true()
    answer = aliased(Answer)
    outside = select(answer.id).where(
        answer.conversation_id == conversation_id,
        or_(answer.deployment.is_(None), answer.deployment.not_in(viewer.deployments)),
    )
    return ~outside.exists()


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: unlike Python's, it tells true from 1."""
    return canonical_json(one) == canonical_json(other)
