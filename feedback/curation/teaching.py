"""What a judgement teaches, in words, for the person who passed it.

Owns: the words. What is made and what isn't comes from `extract`, run with the deployment's policy
on the answer and this one verdict, so that what is promised at once is what a freeze makes later.
Does not own what the whole set decides: duplicates, majorities, caps, sides (`select.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from sqlalchemy.orm import Session

from feedback.curation.examples import Drop, DropReason, Example, ExampleKind, Extracted
from feedback.curation.extract import extract
from feedback.curation.judged import drop_of_conversation, read_alone
from feedback.curation.policy import Policy
from feedback.tables import Comparison, Judgement

FindPolicy = Callable[[str], Policy]
"""The curation policy of the deployment of that name."""

WORDS: Mapping[DropReason, str] = {
    DropReason.WITHDRAWN: "it was taken back",
    DropReason.NOT_HUMAN: "only what people say teaches",
    DropReason.TEACHES_NOTHING: "it says neither what is good nor what is bad",
    DropReason.WHOLE_CONVERSATION: "it doesn't say which answer of the conversation it means",
    DropReason.TASK: "the answer is a front end's own, such as a title",
    DropReason.INTERNAL: "the answer was written for an evaluation",
    DropReason.TEXT_COMPLETION: "the answer is a text completion, and only chats teach",
    DropReason.NOT_STORED: "the answer's text was not kept",
    DropReason.NOT_TRAINABLE: "the answer may not be learned from",
    DropReason.UNFINISHED: "the answer is still being written, and counts once it has ended",
    DropReason.INTERRUPTED: "the answer was interrupted",
    DropReason.FAILED: "the answer failed",
    DropReason.EMPTY_ANSWER: "the answer has no text that can be seen",
    DropReason.EMPTY_CORRECTION: "it has no text that can be seen",
    DropReason.TRUNCATED: "the answer was cut off, and did not end by itself",
    DropReason.UNCHANGED_CORRECTION: "it is the answer itself",
    DropReason.SMALL_EDIT: "less than {min_edit_share:.0%} of the answer was changed",
    DropReason.EQUAL_ANSWERS: "both answers say the same",
    DropReason.PROMPT_TOO_LONG: "what was asked is longer than {max_prompt_chars:,} characters",
    DropReason.COMPLETION_TOO_LONG: "the text is longer than {max_completion_chars:,} characters",
    DropReason.KIND_EXCLUDED: "the deployment's policy makes no such examples",
    DropReason.EXCLUDED_PERSON: "the deployment's policy leaves this person's verdicts out",
}
"""Why a verdict makes nothing, or not all that it could: every reason that `extract` gives."""

_NO_DEPLOYMENT = "the base model was asked by its own name, and only deployments learn"


def describe_all(
    session: Session,
    verdicts: Sequence[Judgement | Comparison],
    find_policy: FindPolicy,
) -> dict[str, str]:
    """What each of `verdicts` teaches by itself, by its id."""
    answers = read_alone(session, verdicts)
    words = {}
    for verdict in verdicts:
        if isinstance(verdict, Judgement) and verdict.answer_id is None:
            made = [(Extracted((), (drop_of_conversation(verdict),)), Policy())]
        else:
            made = [
                (extract(answer, policy), policy)
                for answer in answers[verdict.id]
                if answer.facts.deployment is not None
                for policy in [find_policy(answer.facts.deployment)]
            ]
        words[verdict.id] = describe(made, verdict.person_id)
    return words


def describe(made: Iterable[tuple[Extracted, Policy]], person_id: str) -> str:
    """What one verdict teaches, from what was extracted of each answer that it is about.

    "nothing: …" where nothing was made; else the kinds, then each kind that wasn't made and why. Of
    a comparison one answer may teach nothing at all: it can be another deployment's.
    """
    found = list(made)
    examples = [
        example
        for extracted, policy in found
        if person_id not in policy.excluded_people
        for example in extracted.examples
    ]
    reasons: dict[tuple[str | None, str], None] = {}
    for extracted, policy in found:
        left_out = [
            Drop(None, example.feature.judgement_id, DropReason.EXCLUDED_PERSON)
            for example in extracted.examples
            if person_id in policy.excluded_people
        ]
        for drop in (*extracted.drops, *left_out):
            reasons[drop.kind, WORDS[drop.reason].format(**dict(policy))] = None
    if not found:
        reasons[None, _NO_DEPLOYMENT] = None
    if not examples:
        return _describe_nothing(list(dict.fromkeys(why for _, why in reasons)))
    teaches = " and ".join(_describe_examples(examples))
    left = (
        f"of one answer nothing: {why}" if kind is None else f"no {kind}: {why}"
        for kind, why in reasons
    )
    return "; ".join([teaches, *left])


def _describe_nothing(reasons: Sequence[str]) -> str:
    if reasons == [WORDS[DropReason.WITHDRAWN]]:
        return "nothing"  # they know why
    return f"nothing: {'; '.join(reasons)}" if reasons else "nothing"


def _describe_examples(examples: Iterable[Example]) -> list[str]:
    """One entry for each kind, in the order of the kinds."""
    by_kind: dict[str, list[Example]] = {}
    for example in examples:
        by_kind.setdefault(example.row["kind"], []).append(example)
    words = []
    for kind in (str(kind) for kind in ExampleKind if kind in by_kind):
        said = kind
        if kind == ExampleKind.LABELLED:
            said += f" {str(by_kind[kind][0].row['label']).lower()}"
            said += ", both" if len(by_kind[kind]) > 1 else ""
        words.append(said)
    return words
