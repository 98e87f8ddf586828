"""The types of curation: its input, its examples, and the reasons for which something is dropped.

Plain values without a database, shared by `extract`, `select` and the code that reads or writes
data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from feedback.tables import Preferred, SourceType

Message = dict[str, Any]


class ExampleKind(StrEnum):
    SUPERVISED = "supervised"  #: prompt, completion
    PREFERENCE = "preference"  #: prompt, chosen, rejected
    LABELLED = "labelled"  #: prompt, completion, label


class Side(StrEnum):
    TRAIN = "train"
    HOLDOUT = "holdout"  #: for evaluations only


class DropReason(StrEnum):
    """Why a verdict, or one of the examples it could have made, is not in a data set."""

    WITHDRAWN = "withdrawn"  #: taken back
    NOT_HUMAN = "not_human"  #: a model or a program said it
    TEACHES_NOTHING = "teaches_nothing"  #: three stars, tie, comment, signal
    WHOLE_CONVERSATION = "whole_conversation"  #: does not say which answer it means
    TASK = "task"  #: a front end's own call
    INTERNAL = "internal"  #: an evaluation's answer
    TEXT_COMPLETION = "text_completion"  #: has a prompt and no messages
    NOT_STORED = "not_stored"  #: the text was not kept
    NOT_TRAINABLE = "not_trainable"  #: may not be learned from
    UNFINISHED = "unfinished"  #: still being answered
    INTERRUPTED = "interrupted"  #: the answer's text is partial
    FAILED = "failed"  #: there is no answer
    EMPTY_ANSWER = "empty_answer"  #: the answer has neither text that can be seen nor tool calls
    EMPTY_CORRECTION = "empty_correction"  #: the correction has no text that can be seen
    TRUNCATED = "truncated"  #: cut off by a limit or a stop text; would teach to end there
    UNCHANGED_CORRECTION = "unchanged_correction"  #: says what the answer says
    SMALL_EDIT = "small_edit"  #: teaches by example only: near-equal pairs push both down
    EQUAL_ANSWERS = "equal_answers"  #: both sides of a comparison say the same
    PROMPT_TOO_LONG = "prompt_too_long"
    COMPLETION_TOO_LONG = "completion_too_long"
    KIND_EXCLUDED = "kind_excluded"  #: the policy makes no such examples
    EXCLUDED_PERSON = "excluded_person"  #: the policy leaves this person out
    SUPERSEDED = "superseded"  #: the same person said the opposite later
    PERSON_CAP = "person_cap"  #: past the most that one person may teach
    OUTVOTED = "outvoted"  #: more people said the opposite
    CONTRADICTED = "contradicted"  #: as many people said the opposite
    DUPLICATE = "duplicate"  #: the same example is in the set
    NEAR_HOLDOUT = "near_holdout"  #: too like an example that evaluations use


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """An answer's row and text, as far as examples need them.

    `messages` are the engine's, ours still marked.
    """

    id: str
    deployment: str | None
    kind: str
    status: str
    stored: bool
    trainable: bool
    root_hash: str  #: of its conversation
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    choices: tuple[dict[str, Any], ...] = ()  #: `{index, message, finish_reason, stop_reason}`
    template_hash: str | None = None
    prompt_tokens: int | None = None
    #: variables of the chat template that the request set, as `enable_thinking`
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    served_at: str | None = None  #: ISO 8601 in UTC; templates may write the date


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement of one choice."""

    id: str
    person_id: str
    kind: str
    value: Any
    judged_at: datetime
    choice_index: int = 0
    source_type: str = SourceType.HUMAN


@dataclass(frozen=True, slots=True)
class ComparedVerdict:
    """A comparison, seen from the answer that is side `side` of it."""

    id: str
    person_id: str
    side: Preferred  #: A or B
    preferred: str | None
    choice_index: int
    other: AnswerFacts
    other_choice_index: int
    judged_at: datetime
    source_type: str = SourceType.HUMAN


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """An answer and all that was said about it."""

    facts: AnswerFacts
    verdicts: tuple[Verdict, ...] = ()
    comparisons: tuple[ComparedVerdict, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """What an example asserts: that `target` is good, or isn't.

    Of a preference pair the target is the pair in one order.
    """

    target: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Feature:
    """The facts about an example that `select` decides by, without its text.

    `position` says where the text lies; no decision depends on it.
    """

    example_id: str
    kind: str
    person_id: str
    answer_id: str
    judgement_id: str
    root_hash: str
    prompt_hash: str
    near_hash: str  #: equal for prompts that say nearly the same
    claims: tuple[Claim, ...]
    judged_at: str  #: ISO 8601 in UTC with microseconds: sorts as text
    position: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Example:
    """A training row in TRL's conversational dialect, and its feature."""

    row: dict[str, Any]
    feature: Feature

    def to_json(self) -> dict[str, Any]:
        return {"row": self.row, "feature": asdict(self.feature)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Example:
        claims = tuple(Claim(**claim) for claim in value["feature"]["claims"])
        return cls(value["row"], Feature(**{**value["feature"], "claims": claims}))


@dataclass(frozen=True, slots=True)
class Drop:
    """A verdict that made nothing, or (with `kind`) one example that it did not make."""

    answer_id: str | None
    judgement_id: str
    reason: DropReason
    kind: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Drop:
        return cls(**{**value, "reason": DropReason(value["reason"])})


@dataclass(frozen=True, slots=True)
class Extracted:
    """Each verdict of the answer is named in at least one of the two lists."""

    examples: tuple[Example, ...]
    drops: tuple[Drop, ...]
