"""From rows to token ids, rendered exactly as they will be served.

Owns: rendering with the base's chat template, and the reasons for which a row is dropped. Does not
own: the reading of rows (`rows.py`) or which of them train (`data.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from feedback.formats.messages import as_sent
from feedback.formats.shapes import Kind
from tuner.chat_template import (
    PLAIN,
    AnswerRewritten,
    ChatTemplate,
    TemplateRefused,
    until_end_of_turn,
    without_end,
)
from tuner.control_tokens import ControlTokens
from tuner.crashes import describe_crash
from tuner.training.edits import mark_changes
from tuner.training.rows import DataError, Message, Row, group_of

WHAT_TO_DO: Mapping[str, str] = {
    "other_kind": "choose the method that fits these examples",
    "template_mismatch": "they were served with another chat template; collect new ones",
    "template_refused": "the base's chat template takes no such conversation; change its messages",
    "answer_rewritten": "the base's chat template cuts or moves such answers; give them without "
    "thoughts",
    "too_long": "raise max_length",
    "empty": "their answers have no text",
    "near_validation": "the validation file has their like; give others",
}
"""Every reason for which a row is dropped, and the advice that goes with it."""


class Tokenizer(Protocol):
    """What rendering needs of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text's token ids."""


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """One rendered example: token ids, ready for the model."""

    id: str
    kind: Kind
    prompt: tuple[int, ...]
    #: each ends with the end-of-turn token, unless the answer was cut off
    completions: tuple[tuple[int, ...], ...]
    weight: float
    #: hash of the first user turn, hex; examples of one group stay on one side of the validation
    #: split
    group: str
    label: bool | None = None  #: of a labelled example: whether the answer was called good
    #: of a better answer: which tokens of it (`completions[0]`) aren't copied from the worse one;
    #: None where no worse one is known
    changed: tuple[bool, ...] | None = None

    @property
    def tokens(self) -> int:
        """Prompt and completions together."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def content_hash(self) -> str:
        """Hash (hex) of the token ids."""
        return hashlib.sha256(json.dumps([self.prompt, self.completions]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a set of rows became."""

    examples: tuple[RenderedExample, ...]
    drops: Mapping[str, int]  #: reason to count


class Renderer:
    """Turns rows into token ids with the base's own chat template, in its non-thinking form.

    People's text is defused on the way, as it is when served.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_token_ids: Sequence[int],
        *,
        template: ChatTemplate,
        control_tokens: ControlTokens,
        max_length: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._ends = tuple(end_token_ids)
        self._template = template
        self._control_tokens = control_tokens
        self._max_length = max_length
        self.longest_tokens = 0  #: of all rows that were rendered, dropped ones too

    def render(self, rows: Sequence[Row], kinds: Collection[Kind]) -> Rendered:
        """Render the rows of the given kinds, and count all others by the reason they are dropped.

        Reasons: `other_kind`, `template_mismatch` (the prompt is not what it was when served),
        `template_refused` (the template takes no such conversation), `answer_rewritten` (it writes
        the answer otherwise than it was given), `too_long`, `empty`.
        """
        examples: list[RenderedExample] = []
        drops: Counter[str] = Counter()
        for row in rows:
            example = self._render_row(row) if row.kind in kinds else "other_kind"
            if isinstance(example, str):
                drops[example] += 1
            else:
                examples.append(example)
        return Rendered(tuple(examples), dict(sorted(drops.items())))

    def render_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        variables: Mapping[str, Any] = PLAIN,
        at: datetime | None = None,
    ) -> tuple[int, ...]:
        """Token ids that the engine would be given before it answers."""
        return self._encode(
            self._template.render(
                self._prepare(messages),
                self._control_tokens.defuse_tools(tools),
                add_generation_prompt=True,
                variables=variables,
                at=at,
            )
        )

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        return self._control_tokens.defuse(as_sent(messages))

    def _encode(self, text: str) -> tuple[int, ...]:
        # The template writes what begins a text itself, as for an engine.
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _render_row(self, row: Row) -> RenderedExample | str:
        try:
            return self._render_turns(row)
        except TemplateRefused:
            return "template_refused"
        except AnswerRewritten:
            return "answer_rewritten"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # From here on there are token ids alone: no later error can repeat a text.
            raise DataError(f"a row can't be rendered ({describe_crash(error)})") from None

    def _render_turns(self, row: Row) -> RenderedExample | str:
        if row.prompt_tokens is not None:
            served = self.render_prompt(
                row.prompt, row.tools, variables=row.variables, at=row.served_at
            )
            if row.prompt_tokens != len(served):
                return "template_mismatch"
        rendered = [self._render_answer(row, messages) for messages in row.completions]
        prompt = rendered[0][0]
        if any(len(completion) < 2 for _, completion in rendered):
            return "empty"
        completions = tuple(
            without_end(completion) if messages[-1].get("cut_off") else completion
            for (_, completion), messages in zip(rendered, row.completions, strict=True)
        )
        length = len(prompt) + max(map(len, completions))
        self.longest_tokens = max(self.longest_tokens, length)
        if length > self._max_length:
            return "too_long"
        return RenderedExample(
            row.id,
            row.kind,
            prompt,
            completions,
            row.weight,
            group_of(row.prompt),
            row.label,
            self._mark_changes(row, completions),
        )

    def _mark_changes(
        self, row: Row, completions: Sequence[tuple[int, ...]]
    ) -> tuple[bool, ...] | None:
        if row.kind == "preference":
            return mark_changes(completions[1], completions[0])
        if row.corrects is None:
            return None
        try:
            worse = self._render_answer(row, [row.corrects])[1]
        except (TemplateRefused, AnswerRewritten):  # the better answer can be learned from alone
            return None
        return mark_changes(without_end(worse), completions[0])

    def _render_answer(
        self, row: Row, messages: Sequence[Message]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the prompt and of the answer."""
        asked, answered = self._template.render_answer(
            self._prepare(row.prompt),
            self._prepare(messages)[-1],
            self._control_tokens.defuse_tools(row.tools),
            variables=row.variables,
            at=row.served_at,
        )
        prompt, whole = self._encode(asked), self._encode(asked + answered)
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            # A token reaches over the border. An engine is given the prompt alone.
            answer = self._encode(answered)
        return prompt, until_end_of_turn(answer, self._ends)
