"""What was extracted from judged answers, kept in the database until they are judged anew.

Owns: the cache `extractions`, keyed by answer and by what `extract` reads of the policy. Covered:
answers that are judged, end or are deleted while they are extracted. Does not own what a verdict
teaches (`extract.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from sqlalchemy import CompoundSelect, delete, insert, or_, select, union, update
from sqlalchemy.orm import Session

from feedback.curation.examples import Drop, Example, Extracted
from feedback.curation.extract import extract
from feedback.curation.judged import Moved, list_conversation_drops, list_moved, read_judged
from feedback.curation.policy import Policy
from feedback.db import Database
from feedback.tables import Answer, Comparison, Extraction, Judgement

ANSWERS_PER_PAGE = 200

_CURRENT = Extraction.revision == Answer.revision
"""Condition on extractions: nothing was said about the answer since."""


def extract_all(
    database: Database, deployment: str, policy: Policy, check: Callable[[], None]
) -> Iterator[Extracted]:
    """What every judged answer of the deployment teaches; from the cache where nothing moved."""
    after: str | None = None
    while True:
        check()
        with database.read() as session:
            page = list_moved(session, deployment, after=after, limit=ANSWERS_PER_PAGE)
            known = _find_extracted(session, page, policy)
            judged = read_judged(
                session, [moved.answer_id for moved in page if moved.answer_id not in known]
            )
        fresh = {answer.facts.id: extract(answer, policy) for answer in judged}
        _store_extracted(database, page, fresh, policy)
        found = known | fresh
        yield from (found[moved.answer_id] for moved in page)
        if len(page) < ANSWERS_PER_PAGE:
            break
        after = page[-1].answer_id
    after = None
    while True:
        check()
        with database.read() as session:
            drops = list_conversation_drops(
                session, deployment, after=after, limit=ANSWERS_PER_PAGE
            )
        yield Extracted((), tuple(drops))
        if len(drops) < ANSWERS_PER_PAGE:
            return
        after = drops[-1].judgement_id


def list_extractions(session: Session, verdict_id: str) -> Sequence[Extraction]:
    """What was made of the answers that a verdict is about, as they stand now."""
    of_judgement = select(Judgement.answer_id).where(Judgement.id == verdict_id)
    of_comparison = (
        select(side).where(Comparison.id == verdict_id)
        for side in (Comparison.answer_a, Comparison.answer_b)
    )
    answer_ids = {
        answer_id
        for statement in (of_judgement, *of_comparison)
        for answer_id in session.scalars(statement)
        if answer_id is not None
    }
    return session.scalars(
        select(Extraction)
        .join(Answer, Answer.id == Extraction.answer_id)
        .where(Extraction.answer_id.in_(answer_ids), _CURRENT)
        .order_by(Extraction.answer_id, Extraction.policy_hash)
    ).all()


def forget_person(session: Session, person_id: str) -> None:
    """Drop from the cache what a person's words are in; call it before the person is deleted.

    Verdicts go with whoever passed them and move no revision then, so answers of others that this
    person judged, or that were compared with this person's, are moved here.
    """
    own = select(Answer.id).where(Answer.person_id == person_id)
    told = or_(
        Comparison.person_id == person_id,
        Comparison.answer_a.in_(own),
        Comparison.answer_b.in_(own),
    )
    concerned: CompoundSelect[str | None] = union(
        select(Judgement.answer_id).where(
            Judgement.person_id == person_id, Judgement.answer_id.is_not(None)
        ),
        select(Comparison.answer_a).where(told),
        select(Comparison.answer_b).where(told),
    )
    answer_ids = sorted(answer_id for answer_id in session.scalars(concerned) if answer_id)
    for start in range(0, len(answer_ids), ANSWERS_PER_PAGE):
        page = answer_ids[start : start + ANSWERS_PER_PAGE]
        session.execute(
            update(Answer).where(Answer.id.in_(page)).values(revision=Answer.revision + 1)
        )
        session.execute(delete(Extraction).where(Extraction.answer_id.in_(page)))


def _find_extracted(
    session: Session, page: Sequence[Moved], policy: Policy
) -> dict[str, Extracted]:
    """What the cache has for the answers of `page` at the revisions that they have now."""
    cached = session.execute(
        select(Extraction.answer_id, Extraction.examples, Extraction.drops)
        .join(Answer, Answer.id == Extraction.answer_id)
        .where(
            Extraction.answer_id.in_([moved.answer_id for moved in page]),
            Extraction.policy_hash == policy.extraction_hash,
            _CURRENT,
        )
    )
    return {
        answer_id: Extracted(
            tuple(map(Example.from_json, examples)), tuple(map(Drop.from_json, drops))
        )
        for answer_id, examples, drops in cached
    }


def _store_extracted(
    database: Database, page: Sequence[Moved], fresh: Mapping[str, Extracted], policy: Policy
) -> None:
    """Keep what was extracted, in place of what was made of earlier revisions.

    Not of answers that go on: their end moves no revision. Nor of those that moved or went since
    they were read.
    """
    revisions = {
        moved.answer_id: moved.revision
        for moved in page
        if moved.answer_id in fresh and moved.ended
    }
    if not revisions:
        return
    with database.write() as session:
        current = session.execute(
            select(Answer.id, Answer.revision)
            .where(Answer.id.in_(revisions))
            .order_by(Answer.id)
            .with_for_update(key_share=True, of=Answer)
        )
        still = [name for name, revision in current if revisions[name] == revision]
        revision_now = (
            select(Answer.revision).where(Answer.id == Extraction.answer_id).scalar_subquery()
        )
        session.execute(
            delete(Extraction)
            .where(
                Extraction.answer_id.in_(still),
                or_(
                    Extraction.policy_hash == policy.extraction_hash,
                    Extraction.revision != revision_now,
                ),
            )
            .execution_options(synchronize_session=False)
        )
        if still:
            session.execute(
                insert(Extraction),
                [
                    {
                        "answer_id": answer_id,
                        "policy_hash": policy.extraction_hash,
                        "revision": revisions[answer_id],
                        "examples": [item.to_json() for item in fresh[answer_id].examples],
                        "drops": [item.to_json() for item in fresh[answer_id].drops],
                    }
                    for answer_id in still
                ],
            )
