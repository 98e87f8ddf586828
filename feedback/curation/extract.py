"""The first stage of curation: turns one judged answer into training examples.

A verdict that makes no example gets a reason.

| verdict | teaches |
|---|---|
| rating true, stars >= 4 | labelled true |
| rating false, stars <= 2 | labelled false |
| correction | supervised, and preference over the answer when the edit is large enough |
| comparison, one is better | preference |
| comparison, both bad | labelled false, each |
| three stars, tie, comment, signal, everything that no person said | nothing |

What it says of one verdict is told at once to the person who passed it (`teaching.py`).

Pure and local: it sees one answer with what was said about it. What several answers or people have
to do with each other is for `select.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from feedback.answers import OURS, text_of
from feedback.curation.examples import (
    AnswerFacts,
    Claim,
    ComparedVerdict,
    Drop,
    DropReason,
    Example,
    ExampleKind,
    Extracted,
    Feature,
    JudgedAnswer,
    Message,
    Verdict,
)
from feedback.curation.policy import Policy
from feedback.curation.visible import is_blank, strip_invisible
from feedback.db import canonical_json
from feedback.normal_form import normalise
from feedback.tables import AnswerKind, AnswerStatus, JudgementKind, Preferred, SourceType


class _Dropped(Exception):
    """The example at hand cannot be made."""

    def __init__(self, reason: DropReason) -> None:
        self.reason = reason


def find_label(kind: str, value: Any, policy: Policy) -> bool | None:
    """The label that a rating or stars put on an answer; None where they put none."""
    if kind == JudgementKind.RATING:
        return bool(value)
    if kind == JudgementKind.STARS:
        return (
            True if value >= policy.stars_true else False if value <= policy.stars_false else None
        )
    return None


def extract(answer: JudgedAnswer, policy: Policy) -> Extracted:
    """Examples of one answer, and reasons for what it does not teach."""
    facts = answer.facts
    examples: list[Example] = []
    drops: list[Drop] = []

    def drop(verdict: Verdict | ComparedVerdict, reason: DropReason) -> None:
        drops.append(Drop(facts.id, verdict.id, reason))

    def attempt(
        verdict: Verdict | ComparedVerdict, kind: ExampleKind, make: Callable[[], Example]
    ) -> None:
        try:
            if kind not in policy.kinds:
                raise _Dropped(DropReason.KIND_EXCLUDED)
            examples.append(make())
        except _Dropped as dropped:
            drops.append(Drop(facts.id, verdict.id, dropped.reason, kind))

    for verdict in answer.verdicts:
        reason = _find_reason_to_ignore(verdict.value, verdict.source_type) or _find_unfit(facts)
        if reason is not None:
            drop(verdict, reason)
        elif verdict.kind == JudgementKind.CORRECTION:
            attempt(verdict, ExampleKind.SUPERVISED, partial(_supervise, facts, verdict, policy))
            attempt(verdict, ExampleKind.PREFERENCE, partial(_correct, facts, verdict, policy))
        elif (label := find_label(verdict.kind, verdict.value, policy)) is not None:
            attempt(verdict, ExampleKind.LABELLED, partial(_label, facts, verdict, label, policy))
        else:
            drop(verdict, DropReason.TEACHES_NOTHING)

    for compared in answer.comparisons:
        # A pair is told once: by side A, or by each side where their deployments differ.
        tells = compared.side == Preferred.A or compared.other.deployment != facts.deployment
        reason = _find_reason_to_ignore(compared.preferred, compared.source_type)
        if reason is None and compared.preferred == Preferred.TIE:
            reason = DropReason.TEACHES_NOTHING
        if reason is not None:
            if tells:
                drop(compared, reason)
        elif compared.preferred == Preferred.BOTH_BAD:
            attempt(compared, ExampleKind.LABELLED, partial(_label, facts, compared, False, policy))
        elif tells:
            attempt(compared, ExampleKind.PREFERENCE, partial(_prefer, facts, compared, policy))
    return Extracted(tuple(examples), tuple(drops))


def edit_share(before: str, after: str) -> float:
    """The share of a text that an edit changes, from 0 (nothing) to 1 (everything).

    It is 1 minus the Dice coefficient of the pairs of adjacent words. Linear in length. A word
    exchanged in a sentence of twenty is about 0.1, in one of six about 0.3.
    """
    one, other = _word_pairs(before), _word_pairs(after)
    total = one.total() + other.total()
    return 1 - 2 * (one & other).total() / total if total else 0.0


def build_prompt_hash(messages: Iterable[Mapping[str, Any]]) -> str:
    """Hash of the prompt's normalised turns, system messages left out; 32 hex digits."""
    said = [
        [message.get("role"), normalise(text_of(message.get("content"))), message.get("tool_calls")]
        for message in messages
        if message.get("role") != "system"
    ]
    return _hash(said)


def build_near_hash(messages: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the prompt's words alone, for finding near duplicates; 32 hex digits.

    System messages, punctuation, message boundaries and tool calls are left out. A prompt without
    words has its `build_prompt_hash`.
    """
    words = [
        word
        for message in messages
        if message.get("role") != "system"
        for word in _ONLY_WORDS.findall(normalise(text_of(message.get("content"))))
    ]
    return _hash(words) if words else build_prompt_hash(messages)


def _find_reason_to_ignore(value: Any, source_type: str) -> DropReason | None:
    if value is None:
        return DropReason.WITHDRAWN
    return None if source_type == SourceType.HUMAN else DropReason.NOT_HUMAN


_UNFIT_KINDS = {
    AnswerKind.TEXT: DropReason.TEXT_COMPLETION,
    AnswerKind.TASK: DropReason.TASK,
    AnswerKind.INTERNAL: DropReason.INTERNAL,
}
_UNFIT_STATUSES = {
    AnswerStatus.STARTED: DropReason.UNFINISHED,
    AnswerStatus.INTERRUPTED: DropReason.INTERRUPTED,
    AnswerStatus.FAILED: DropReason.FAILED,
}


# Finish reasons of an answer that the model ended; None where an engine gives none.
_BY_ITSELF = ("stop", "tool_calls", "function_call", None)


def _find_unfit(facts: AnswerFacts) -> DropReason | None:
    """Why nothing at all can be learned from this answer."""
    if facts.kind != AnswerKind.CHAT:
        return _UNFIT_KINDS[AnswerKind(facts.kind)]
    if not facts.trainable:
        return DropReason.NOT_TRAINABLE
    return None if facts.stored and facts.messages else DropReason.NOT_STORED


def _label(
    facts: AnswerFacts, verdict: Verdict | ComparedVerdict, label: bool, policy: Policy
) -> Example:
    completion = _find_completion(facts, verdict.choice_index, policy, as_model=label)
    return _build(
        ExampleKind.LABELLED,
        facts,
        verdict,
        policy,
        {"completion": [completion], "label": label},
        claim_targets=[("answer", completion, label)],
    )


def _supervise(facts: AnswerFacts, verdict: Verdict, policy: Policy) -> Example:
    correction = _find_correction(verdict, policy)
    answer = _find_message(facts, verdict.choice_index)
    if answer is not None and _say_the_same(correction, answer):
        raise _Dropped(DropReason.UNCHANGED_CORRECTION)
    return _build(
        ExampleKind.SUPERVISED,
        facts,
        verdict,
        policy,
        {"completion": [correction]},
        corrects=None if answer is None or _is_too_long(answer, policy) else answer,
    )


def _correct(facts: AnswerFacts, verdict: Verdict, policy: Policy) -> Example:
    chosen = _find_correction(verdict, policy)
    rejected = _find_completion(facts, verdict.choice_index, policy, as_model=False)
    if _say_the_same(chosen, rejected):
        raise _Dropped(DropReason.UNCHANGED_CORRECTION)
    if edit_share(_flatten(rejected), _flatten(chosen)) < policy.min_edit_share:
        raise _Dropped(DropReason.SMALL_EDIT)
    return _build_pair(
        facts, verdict, policy, chosen, rejected, claim_targets=[("answer", rejected, False)]
    )


def _prefer(facts: AnswerFacts, compared: ComparedVerdict, policy: Policy) -> Example:
    reason = _find_unfit(facts) or _find_unfit(compared.other)
    if reason is not None:
        raise _Dropped(reason)
    sides = [(facts, compared.choice_index), (compared.other, compared.other_choice_index)]
    if compared.preferred != compared.side:
        sides.reverse()
    chosen = _find_completion(*sides[0], policy, as_model=True)
    rejected = _find_completion(*sides[1], policy, as_model=False)
    if _say_the_same(chosen, rejected):
        raise _Dropped(DropReason.EQUAL_ANSWERS)
    return _build_pair(sides[0][0], compared, policy, chosen, rejected)


def _find_message(facts: AnswerFacts, choice_index: int) -> Message | None:
    choice = next((choice for choice in facts.choices if choice.get("index") == choice_index), None)
    return None if choice is None or "message" not in choice else _clean(choice["message"])


def _find_completion(
    facts: AnswerFacts, choice_index: int, policy: Policy, *, as_model: bool
) -> Message:
    """A choice as something to learn from.

    `as_model`: to be imitated, so it must have ended by itself. As a bad example one that was cut
    off is marked `cut_off`: the model wrote no end token there, and none is trained.
    """
    reason = _find_unfit(facts) or _UNFIT_STATUSES.get(AnswerStatus(facts.status))
    if reason is not None:
        raise _Dropped(reason)
    message = _find_message(facts, choice_index)
    if message is None or is_blank(_flatten(message)):
        raise _Dropped(DropReason.EMPTY_ANSWER)
    choice = next(choice for choice in facts.choices if choice.get("index") == choice_index)
    if choice.get("finish_reason") not in _BY_ITSELF or choice.get("stop_reason") is not None:
        if as_model:
            raise _Dropped(DropReason.TRUNCATED)
        message["cut_off"] = True
    return _check_length(message, policy)


def _is_too_long(message: Message, policy: Policy) -> bool:
    return len(_flatten(message)) > policy.max_completion_chars


def _check_length(message: Message, policy: Policy) -> Message:
    if _is_too_long(message, policy):
        raise _Dropped(DropReason.COMPLETION_TOO_LONG)
    return message


def _clean(message: Mapping[str, Any]) -> Message:
    """The assistant message reduced to the fields that are trained on."""
    kept: Message = {"role": "assistant", "content": message.get("content")}
    if message.get("tool_calls"):
        kept["tool_calls"] = message["tool_calls"]
    return kept


def _find_correction(verdict: Verdict, policy: Policy) -> Message:
    """What the person wrote, without white space around it."""
    correction = _clean(verdict.value)
    if isinstance(correction["content"], str):
        correction["content"] = correction["content"].strip()
    if is_blank(_flatten(correction)):
        raise _Dropped(DropReason.EMPTY_CORRECTION)
    return _check_length(correction, policy)


def _say_the_same(one: Message, other: Message) -> bool:
    return strip_invisible(_flatten(one)) == strip_invisible(_flatten(other))


def _flatten(message: Mapping[str, Any]) -> str:
    """All that a message says, as one text."""
    calls = message.get("tool_calls")
    return text_of(message.get("content")) + (canonical_json(calls) if calls else "")


def _build_pair(
    facts: AnswerFacts,
    verdict: Verdict | ComparedVerdict,
    policy: Policy,
    chosen: Message,
    rejected: Message,
    claim_targets: Iterable[tuple[str, Message, bool]] = (),
) -> Example:
    first, second = sorted([chosen, rejected], key=canonical_json)
    pair = {"role": "pair", "content": [first, second]}
    return _build(
        ExampleKind.PREFERENCE,
        facts,
        verdict,
        policy,
        {"chosen": [chosen], "rejected": [rejected]},
        claim_targets=[("pair", pair, chosen == first), *claim_targets],
    )


def _build(
    kind: ExampleKind,
    facts: AnswerFacts,
    verdict: Verdict | ComparedVerdict,
    policy: Policy,
    taught: dict[str, Any],
    *,
    claim_targets: Iterable[tuple[str, Message, bool]] = (),
    corrects: Message | None = None,
) -> Example:
    """The row and the feature. Its id is a hash of what it teaches, and of nothing else.

    `corrects`: the answer that `taught` is a better one for. It shows what was changed, and teaches
    nothing itself.
    """
    prompt = [
        {key: value for key, value in message.items() if key != OURS} for message in facts.messages
    ]
    if sum(len(_flatten(message)) for message in prompt) > policy.max_prompt_chars:
        raise _Dropped(DropReason.PROMPT_TOO_LONG)
    said: dict[str, Any] = {"prompt": prompt, **taught}
    if facts.tools:
        said["tools"] = list(facts.tools)
    example_id = "ex_" + _hash([kind, said])
    prompt_hash = build_prompt_hash(prompt)
    row: dict[str, Any] = {
        "kind": kind.value,
        "id": example_id,
        **said,
        "prompt_tokens": facts.prompt_tokens,
        "template_hash": facts.template_hash,
        "weight": 1.0,
    }
    if corrects is not None:
        row["corrects"] = [corrects]
    if facts.template_kwargs:
        row["template_kwargs"] = facts.template_kwargs
    if facts.served_at is not None:
        row["served_at"] = facts.served_at
    feature = Feature(
        example_id=example_id,
        kind=kind.value,
        person_id=verdict.person_id,
        answer_id=facts.id,
        judgement_id=verdict.id,
        root_hash=facts.root_hash,
        prompt_hash=prompt_hash,
        near_hash=build_near_hash(prompt),
        claims=tuple(
            Claim(_hash([what, prompt_hash, of]), holds) for what, of, holds in claim_targets
        ),
        judged_at=verdict.judged_at.isoformat(timespec="microseconds"),
    )
    return Example(row, feature)


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:32]


# A word, a sign, or (where writing sets no spaces) a character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")


_ONLY_WORDS = re.compile(r"\w+")


def _word_pairs(text: str) -> Counter[tuple[str, str]]:
    return Counter(pairwise(["", *_WORD.findall(normalise(text)), ""]))
