"""Forty people with one hidden wish: who says what about which answer.

Pure, and the same for the same wish, kinds, people and seed: the sizes of a benchmark are prefixes
of one sequence. One judgement in ten is turned round, and mixed kinds take turns, so that shares
are exact in every ten and every three.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from benchmarks.crowd.prompts import JUDGED, Prompt
from benchmarks.crowd.wishes import Wish, list_sentences

PEOPLE: Final = 40
SIZES: Final = (20, 50, 100, 200, 400)
NOISE_IN: Final = 10  #: one judgement of so many is turned round
TRIES: Final = 3  #: answers that somebody asks for to find one to correct


class Kinds(StrEnum):
    """What people give."""

    THUMBS = "thumbs"
    COMPARISONS = "comparisons"
    CORRECTIONS = "corrections"
    MIXED = "mixed"  #: a third each


SINGLE: Final = (Kinds.THUMBS, Kinds.COMPARISONS, Kinds.CORRECTIONS)


@dataclass(frozen=True, slots=True)
class Turn:
    """One judgement before it is made."""

    number: int
    person: str
    kind: Kinds  #: never mixed
    prompt: Prompt
    turned: bool  #: the opposite of what the wish says

    def wants_another(self, wish: Wish, answers: Sequence[str]) -> bool:
        """Whether this person asks once more before judging.

        A comparison takes two answers. Nobody corrects what is right: somebody who came to correct
        asks again, three times at most.
        """
        if self.kind is not Kinds.CORRECTIONS:
            return len(answers) < (2 if self.kind is Kinds.COMPARISONS else 1)
        if len(answers) >= TRIES:
            return False
        return all(wish.is_met(self.prompt.text, answer) for answer in answers)


def plan(wish: Wish, kinds: Kinds, people: int, seed: int, size: int = SIZES[-1]) -> list[Turn]:
    """The turns of a crowd, the first `size`: each about a prompt of its own."""
    draw = random.Random(f"{wish.name} {kinds} {people} {seed}")
    prompts = draw.sample(JUDGED, len(JUDGED))
    if size > len(prompts):
        raise ValueError(f"{size} judgements are asked for, and there are {len(prompts)} prompts")
    turns: list[Turn] = []
    order: list[Kinds] = []
    asked: list[int] = []
    for number in range(size):
        if number % NOISE_IN == 0:
            noisy = number + draw.randrange(NOISE_IN)
        if not order:
            order = draw.sample(SINGLE, 3) if kinds is Kinds.MIXED else [kinds]
        if not asked:
            asked = draw.sample(range(people), people)
        person = f"person-{asked.pop() + 1:02}"
        turns.append(Turn(number, person, order.pop(), prompts[number], number == noisy))
    return turns


def judge(wish: Wish, turn: Turn, ids: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """The body of `/v1/comparisons` for a comparison, of `/v1/feedback` otherwise."""
    met = [wish.is_met(turn.prompt.text, answer) for answer in answers]
    said: dict[str, Any] = {"user": turn.person}
    if turn.kind is Kinds.COMPARISONS:
        if met[0] != met[1]:
            preferred = "a" if met[0] != turn.turned else "b"
        else:
            preferred = "tie" if met[0] != turn.turned else "both_bad"
        return {**said, "completion_ids": list(ids[:2]), "preferred": preferred}
    if turn.kind is Kinds.THUMBS:
        return {**said, "completion_id": ids[0], "kind": "rating", "value": met[0] != turn.turned}
    at = len(answers) - 1  # the first that misses the wish, or the last try
    prompt, answer = turn.prompt.text, answers[at]
    text = spoil(wish, prompt, answer) if turn.turned else wish.better(prompt, answer)
    return {**said, "completion_id": ids[at], "kind": "correction", "value": text}


def spoil(wish: Wish, prompt: str, answer: str) -> str:
    """A correction by somebody who wants something else: another text, and the wish is not met.

    Shorter by a sentence or, where that would do, longer by one. An answer that can't be spoilt so
    stays as it is.
    """
    sentences = list_sentences(answer)
    first, last = (sentences[0], sentences[-1]) if sentences else ("", "")
    shorter = answer.rstrip().removesuffix(last).rstrip()
    for text in (shorter, f"{answer.rstrip()} {first}", f"{answer.rstrip()}\n\n{answer.strip()}"):
        if text.strip() and text != answer and not wish.is_met(prompt, text):
            return text
    return answer
