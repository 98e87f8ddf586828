"""What a release has forgotten: plain text it should still expect, and the base's own answers.

Owns: the text and the prompts that every evaluation reads, the base's answers to these and where
they are kept, and the two figures: the negative log-likelihood of the text, and how far a release
has moved from the base. Does not own: the limits (`gate.py`), or the requests
(`gateway_client.py`).

The text is the project's own and nobody tunes on it. Its passages are read as they are: no chat
template, no end token. What a deployment teaches has no place in it, so a release that finds it
less likely has paid with something that nobody asked it to give up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from tuner.evaluation.figures import General, Moved
from tuner.evaluation.gateway_client import (
    Asked,
    GatewayClient,
    GatewayError,
    GatewayUnreachable,
    Message,
    Score,
    Unscored,
)
from tuner.evaluation.threads import in_threads
from tuner.tables import Release

logger = logging.getLogger(__name__)

ANSWER_TOKENS: Final = 64
THREADS: Final = 8
_TEXT: Final = "general.txt"
_BETWEEN: Final = "----\n"

PROMPTS: Final = (
    "Which planet is closest to the sun?",
    "Translate into French: The shop closes at six in the evening.",
    "What is 17 times 6? Show how you got there.",
    "Write a Python function that reverses a list without changing it.",
    "Summarise in one sentence: The ferry was late because of fog, and the last bus had gone, so "
    "the passengers spent the night in the waiting room.",
    "Name three fruits that are yellow.",
    "Rewrite politely: Send me the file now.",
    "Why do leaves turn red in autumn?",
    "What does the word 'reluctant' mean? Use it in a sentence.",
    "Wie heißt die Hauptstadt von Österreich?",
    "Give me a title for a story about a lost umbrella.",
    "Is a whale a fish? Explain briefly.",
    "If all cats are animals and some animals are black, are all cats black?",
    "What is the difference between a lemon and a lime?",
    "Write a short apology for missing a meeting.",
    "Explain to a child how an aeroplane stays in the air.",
    "¿Qué significa la palabra 'mañana'?",
    "Put these words in alphabetical order: pear, apple, orange, plum.",
    "Hello! How are you today?",
    "Give the opposite of each word: hot, early, generous.",
    "What happens to water when it freezes?",
    "Write one line of SQL that counts the rows of a table named visits.",
    "Who wrote Hamlet, and what is it about?",
    "Suggest a name for a small bakery by the sea.",
)
"""What the base is asked once; of many kinds, and about nothing that one deployment is for."""


@dataclass(frozen=True, slots=True)
class BaseAnswer:
    """What the base said to one of `PROMPTS` at temperature 1."""

    prompt: str
    text: str
    cut_off: bool

    def as_item(self, system_prompt: str | None) -> tuple[Asked, Message]:
        """As something to score, behind the system prompt that it was given with."""
        message = {"role": "assistant", "content": self.text, "cut_off": self.cut_off}
        asked = [{"role": "user", "content": self.prompt}]
        if system_prompt:
            asked.insert(0, {"role": "system", "content": system_prompt})
        return Asked(asked), message


def read_passages() -> list[str]:
    """The passages of the built-in text."""
    text = files("tuner.evaluation").joinpath(_TEXT).read_text(encoding="utf-8")
    return [passage.strip("\n") for passage in text.split(_BETWEEN)]


def measure_general(
    client: GatewayClient,
    releases: Sequence[str],
    origin: Release,
    answers: Sequence[BaseAnswer] | None,
    report: Callable[[int], None],
) -> dict[str, General]:
    """Both figures of each of `releases` and of the base, by name.

    `answers` are those of `origin`, None where it couldn't be asked. How far a release has moved is
    estimated from them: the mean of `log p(base) - log p(release)` over their tokens is
    `KL(base ‖ release)`, without bias. `report` is called with how many releases are done.
    """
    passages = read_passages()
    items = [answer.as_item(origin.system_prompt) for answer in answers or ()]

    def measure(name: str) -> tuple[list[Score | Unscored], list[Score | Unscored]]:
        return client.score_text(name, passages), client.score(name, items)

    base = origin.base_model
    names = list(dict.fromkeys([base, *releases]))
    found = dict(zip(names, in_threads(measure, names, 1, report), strict=True))
    return {
        name: General(*_mean_nll(texts), _estimate_kl(found[base][1], scored))
        for name, (texts, scored) in found.items()
    }


def _mean_nll(found: Sequence[Score | Unscored]) -> tuple[float | None, int]:
    """Nats per token over all texts, and how many tokens; None unless all have a score."""
    scores = [score for score in found if isinstance(score, Score)]
    tokens = sum(score.completion_tokens for score in scores)
    if not tokens or len(scores) < len(found):
        return None, tokens
    return -math.fsum(score.logprob for score in scores) / tokens, tokens


def _estimate_kl(
    base: Sequence[Score | Unscored], release: Sequence[Score | Unscored]
) -> Moved | None:
    """Nats per token, with its standard error over the answers; None with fewer than two."""
    found = [
        (one, other)
        for one, other in zip(base, release, strict=True)
        if isinstance(one, Score) and isinstance(other, Score)
    ]
    if len(found) < 2:
        return None
    tokens = [one.completion_tokens for one, _ in found]
    gaps = [one.logprob - other.logprob for one, other in found]
    kl = math.fsum(gaps) / sum(tokens)
    # Of a ratio of sums: what each answer's gap differs by from what its length makes expected.
    rest = [gap - kl * count for gap, count in zip(gaps, tokens, strict=True)]
    return Moved(kl, stdev(rest) / math.sqrt(len(rest)) / fmean(tokens))


def read_base_answers(
    client: GatewayClient, folder: Path, origin: Release, report: Callable[[int], None]
) -> list[BaseAnswer] | None:
    """The answers of the base release to `PROMPTS`; None where it can't be asked now.

    Asked once and kept in `folder`: the file's name is a hash of all that they depend on. `report`
    is called with how many are there.
    """
    depends = [origin.base_model, origin.base_revision, origin.template_hash, origin.system_prompt]
    named = json.dumps([*depends, ANSWER_TOKENS, *PROMPTS]).encode()
    file = folder / f"{hashlib.sha256(named).hexdigest()[:32]}.jsonl"
    if (kept := _read(file)) is not None:
        return kept

    def ask(numbered: tuple[int, str]) -> BaseAnswer:
        seed, prompt = numbered
        said = client.generate(
            origin.name,
            Asked([{"role": "user", "content": prompt}]),
            max_tokens=ANSWER_TOKENS,
            temperature=1,
            seed=seed,
        )
        return BaseAnswer(prompt, said.text, said.finish_reason == "length")

    try:
        found = in_threads(ask, list(enumerate(PROMPTS)), THREADS, report)
    except (GatewayError, GatewayUnreachable) as error:
        logger.warning(
            "The base gave no answers to compare with",
            extra={"action": "general_answers_missing", "error": type(error).__name__},
        )
        return None
    try:
        _write(file, found)
    except OSError as error:  # a full disk costs the next evaluation its time, not this one
        logger.warning(
            "The base's answers were not kept",
            extra={"action": "general_answers_not_kept", "error": type(error).__name__},
        )
    return found


def _read(file: Path) -> list[BaseAnswer] | None:
    """What the file holds; None where it is missing or is not what was written."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = [BaseAnswer(row["prompt"], row["text"], row["cut_off"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if tuple(answer.prompt for answer in found) == PROMPTS else None


def _write(file: Path, answers: Sequence[BaseAnswer]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole: workers may share the folder, and may be killed.
    incoming = file.with_name(f".{file.name}.{os.getpid()}")
    rows = (
        {"prompt": answer.prompt, "text": answer.text, "cut_off": answer.cut_off}
        for answer in answers
    )
    incoming.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    incoming.replace(file)
