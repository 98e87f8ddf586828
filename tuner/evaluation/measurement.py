"""Measuring a candidate and its baseline on a holdout, through the gateway.

Owns: what is asked of the gateway (scores by log-probability, greedy answers), how much of it, and
the figures that come of it. Does not own the requests (`gateway_client.py`), the decision
(`gate.py`) or the rows (`holdout.py`).

A holdout row keeps the prompt as some release answered it. Where that begins with a system prompt
of the deployment's own releases, each release is measured with its own instead, so that a release
which differs in nothing but its prompt can be evaluated too; a caller's own system message stays,
behind the release's prompt where the deployment prepends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.answers import text_of
from feedback.canonical import json_in_order
from feedback.curation.examples import ExampleKind
from feedback.curation.extract import build_prompt_hash
from feedback.formats.messages import join_parts
from tuner.evaluation import general
from tuner.evaluation.figures import Figures, General, Labelled, Paired, Written
from tuner.evaluation.gate import GateResult, decide
from tuner.evaluation.gateway_client import (
    ITEMS_PER_REQUEST,
    Asked,
    GatewayClient,
    GatewayError,
    GeneratedAnswer,
    Message,
    Score,
    Unscored,
)
from tuner.evaluation.holdout import Holdout
from tuner.evaluation.threads import in_threads
from tuner.tables import Release

ROWS_PER_PORTION = 32
"""Enough to fill the engine's batches."""
Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured. On two cores without a GPU the defaults take one to three minutes."""

    max_rows: int = 200  #: holdout rows of each kind, the first
    max_answers: int = 12  #: prompts that both releases answer
    max_tokens: int = 128  #: per generated answer
    threads: int = 8  #: requests at once


@dataclass(frozen=True, slots=True)
class Subject:
    """What an evaluation compares, and on what."""

    candidate: Release
    baseline: Release
    #: the holdout, without what either learned from, in an order that says nothing about it
    rows: Sequence[Mapping[str, Any]]
    own_prompts: frozenset[str]  #: system prompts of the deployment's releases
    #: the release of the base itself, by which it is seen what others forgot; None: not looked at
    origin: Release | None = None
    prepends: bool = False  #: whether these stand before a caller's own system message
    left_out: int = 0  #: holdout rows that one of the two learned from
    candidate_deleted: Sequence[str] = ()  #: files that it learned from, deleted since
    baseline_deleted: Sequence[str] = ()


def run_evaluation(
    client: GatewayClient,
    subject: Subject,
    *,
    report: Report,
    extent: Extent | None = None,
    folder: Path | None = None,
) -> tuple[GateResult, dict[str, Any]]:
    """Measure both releases and decide; returns the result and the figures behind it.

    `folder` keeps the base's answers from one evaluation to the next; without it the base isn't
    asked. `report` is called between requests; what it raises ends the evaluation.

    Raises `GatewayError`, `GatewayUnreachable`, `SlotLost`.
    """
    extent = extent or Extent()
    if subject.candidate.adapter_id is not None and (subject.rows or subject.origin is not None):
        # In a thread as well: a worker told to stop need not wait until the candidate is loaded.
        (slot,) = in_threads(
            client.take_evaluation_slot,
            [subject.candidate.name],
            1,
            lambda done: report("loading the candidate", done, 1),
        )
        with client.keep_evaluation_slot(slot) as check_slot:

            def report_while_held(what: str, done: int, total: int) -> None:
                check_slot()
                report(what, done, total)

            figures, metrics = _measure(client, subject, extent, report_while_held, folder)
    else:
        figures, metrics = _measure(client, subject, extent, report, folder)
    return decide(figures), metrics


def build_prompt(prompt: Sequence[Message], release: Release, subject: Subject) -> list[Message]:
    """`prompt` as `release` would get it: with its own system prompt in place of the one it had."""
    spoken = _without_own_prompt(prompt, subject)
    own = release.system_prompt
    if not own:
        return spoken
    if not (spoken and spoken[0].get("role") in _SYSTEM):
        return [{"role": "system", "content": own}, *spoken]
    if not subject.prepends:
        return spoken
    theirs = join_parts(spoken[0].get("content")) or ""
    return [{**spoken[0], "content": f"{own}\n\n{theirs}"}, *spoken[1:]]


def _measure(
    client: GatewayClient, subject: Subject, extent: Extent, report: Report, folder: Path | None
) -> tuple[Figures, dict[str, Any]]:
    nll: list[Paired] = []
    chosen_nll: list[Paired] = []
    margins: list[Paired] = []
    labelled: list[Labelled] = []
    unscored: Counter[str] = Counter()
    for row, found in _score_in_portions(client, subject, extent, report):
        unit = build_prompt_hash(row["prompt"])
        if isinstance(found, Unscored):
            unscored[found.error] += 1
        elif row["kind"] == "supervised":
            nll.append(Paired(unit, found.nll("completion", 0), found.nll("completion", 1)))
        elif row["kind"] == "preference":
            chosen_nll.append(Paired(unit, found.nll("chosen", 0), found.nll("chosen", 1)))
            margins.append(Paired(unit, found.margin(0), found.margin(1)))
        else:
            shift = found.nll("completion", 1) - found.nll("completion", 0)
            labelled.append(Labelled(unit, bool(row["label"]), shift))
    candidate_answers, baseline_answers = _write_answers(client, subject, extent, report)
    candidate, baseline, base = _measure_general(client, subject, report, folder)
    return (
        Figures(
            nll,
            chosen_nll,
            margins,
            labelled,
            candidate_answers,
            baseline_answers,
            candidate,
            baseline,
            base,
            subject.candidate_deleted,
            subject.baseline_deleted,
        ),
        {
            "holdout_rows": len(subject.rows),
            "left_out_rows": subject.left_out,
            "unscored_rows": unscored.total(),
            "unscored": dict(sorted(unscored.items())),
            "supervised_rows": len(nll),
            "preference_rows": len(margins),
            "labelled_rows": len(labelled),
            "generated_answers": len(candidate_answers),
            **_describe_general(candidate, baseline, base),
        },
    )


def _measure_general(
    client: GatewayClient, subject: Subject, report: Report, folder: Path | None
) -> tuple[General, General, General]:
    """What candidate, baseline and base make of what nobody taught them."""
    origin = subject.origin
    if origin is None:
        return General(), General(), General()
    answers = None
    if folder is not None:
        answers = general.read_base_answers(
            client,
            folder,
            origin,
            lambda done: report("asking the base", done, len(general.PROMPTS)),
        )
    names = [_scored_as(release) for release in (subject.candidate, subject.baseline)]
    found = general.measure_general(
        client,
        names,
        origin,
        answers,
        lambda done: report("reading general text", done, len({*names, origin.base_model})),
    )
    return found[names[0]], found[names[1]], found[origin.base_model]


def _describe_general(candidate: General, baseline: General, base: General) -> dict[str, Any]:
    """The figures by name; a change is a share of the base's."""
    found: dict[str, Any] = {
        "general_tokens": base.tokens,
        "general_nll": candidate.nll,
        "general_nll_baseline": baseline.nll,
        "general_nll_base": base.nll,
        "general_nll_change": None,
        "kl": None if candidate.moved is None else candidate.moved.kl,
        "kl_error": None if candidate.moved is None else candidate.moved.error,
        "kl_baseline": None if baseline.moved is None else baseline.moved.kl,
    }
    if candidate.nll is not None and base.nll:
        found["general_nll_change"] = candidate.nll / base.nll - 1
    return found


@dataclass(frozen=True, slots=True)
class _RowScores:
    """Scores of one row's completions under candidate (0), baseline (1) and the base (2)."""

    by_part: Mapping[str, tuple[Score, Score, Score]]

    def nll(self, part: str, release: int) -> float:
        score = self.by_part[part][release]
        return -score.logprob / max(score.completion_tokens, 1)

    def margin(self, release: int) -> float:
        chosen, rejected = self.by_part["chosen"], self.by_part["rejected"]
        mine = chosen[release].logprob - rejected[release].logprob
        return mine - (chosen[2].logprob - rejected[2].logprob)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Scores by request, so that what is the same request for two releases is asked once."""

    subject: Subject
    scores: Mapping[tuple[str, str], Score | Unscored]

    def of(self, row: Mapping[str, Any]) -> _RowScores | Unscored:
        """The row's scores, or why one is missing."""
        by_part = {}
        for part in _parts(row):
            found = [
                self.scores[model, _key(prompt, row[part][0])]
                for model, prompt in _askings(self.subject, row)
            ]
            scored = [score for score in found if isinstance(score, Score)]
            if len(scored) < len(found):
                return next(score for score in found if isinstance(score, Unscored))
            by_part[part] = (scored[0], scored[1], scored[2])
        return _RowScores(by_part)


def _score_in_portions(
    client: GatewayClient, subject: Subject, extent: Extent, report: Report
) -> Iterator[tuple[Mapping[str, Any], _RowScores | Unscored]]:
    """The first `max_rows` rows of each kind with their scores; a few at a time are in memory."""
    by_kind: dict[str, list[int]] = {kind: [] for kind in ExampleKind}
    for index, (kind, _) in enumerate(_list_kinds_and_prompts(subject.rows)):
        if kind in by_kind and len(by_kind[kind]) < extent.max_rows:
            by_kind[kind].append(index)
    chosen = [index for kind in ExampleKind for index in by_kind[kind]]
    for start in range(0, len(chosen), ROWS_PER_PORTION):
        rows = [subject.rows[index] for index in chosen[start : start + ROWS_PER_PORTION]]

        def report_rows(
            what: str, done: int, total: int, start: int = start, count: int = len(rows)
        ) -> None:
            report(what, start + count * done // max(total, 1), len(chosen))

        scores = _score_all(client, subject, rows, report_rows)
        for row in rows:
            yield row, scores.of(row)


def _list_kinds_and_prompts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Kind and hash of the prompt of each row: those of a holdout are known without reading it."""
    if isinstance(rows, Holdout):
        return rows.list_kinds_and_prompts()
    return [(row["kind"], build_prompt_hash(row["prompt"])) for row in rows]


def _score_all(
    client: GatewayClient, subject: Subject, rows: Sequence[Mapping[str, Any]], report: Report
) -> _Scores:
    wanted: dict[str, dict[str, tuple[Asked, Message]]] = {}
    for row in rows:
        for model, prompt in _askings(subject, row):
            for part in _parts(row):
                item = (prompt, row[part][0])
                wanted.setdefault(model, {})[_key(*item)] = item
    batches = [
        (model, list(items)[start : start + ITEMS_PER_REQUEST])
        for model, items in wanted.items()
        for start in range(0, len(items), ITEMS_PER_REQUEST)
    ]
    total = sum(len(keys) for _, keys in batches)

    def score(batch: tuple[str, list[str]]) -> list[Score | Unscored]:
        model, keys = batch
        return client.score(model, [wanted[model][key] for key in keys])

    def report_batches(done: int) -> None:
        report("scoring the holdout", sum(len(keys) for _, keys in batches[:done]), total)

    # One request at a time: its items already fill the engine's batch. In a thread, so that a
    # worker told to stop need not wait for it.
    found = in_threads(score, batches, 1, report_batches)
    report_batches(len(batches))
    return _Scores(
        subject,
        {
            (model, key): item
            for (model, keys), items in zip(batches, found, strict=True)
            for key, item in zip(keys, items, strict=True)
        },
    )


def _askings(subject: Subject, row: Mapping[str, Any]) -> list[tuple[str, Asked]]:
    """(model, prompt) under candidate, baseline and base."""
    return [
        *(
            (
                _scored_as(release),
                _ask(row, build_prompt(row["prompt"], release, subject)),
            )
            for release in (subject.candidate, subject.baseline)
        ),
        (subject.candidate.base_model, _ask(row, row["prompt"])),
    ]


def _scored_as(release: Release) -> str:
    """A release without adapter is the base with its prompt."""
    return release.name if release.adapter_id is not None else release.base_model


def _ask(row: Mapping[str, Any], messages: Sequence[Message]) -> Asked:
    return Asked(messages, row.get("tools"), row.get("template_kwargs") or {})


def _write_answers(
    client: GatewayClient, subject: Subject, extent: Extent, report: Report
) -> tuple[list[Written], list[Written]]:
    """Greedy answers of both releases to the same prompts.

    A prompt that one of them can't answer is left out of both.
    """
    prompts: dict[str, tuple[Asked, int | None]] = {}
    for index, (_, key) in enumerate(_list_kinds_and_prompts(subject.rows)):
        has_all = prompts[key][1] is not None if key in prompts else None
        if has_all or (has_all is None and len(prompts) >= extent.max_answers):
            continue
        row = subject.rows[index]
        good = _good_answer(row)
        words = None if good is None else len(good.split())
        if key in prompts:
            prompts[key] = (prompts[key][0], words)
        else:
            prompts[key] = (_ask(row, _without_own_prompt(row["prompt"], subject)), words)
    releases = (subject.candidate.name, subject.baseline.name)
    asked = [(release, prompt) for prompt, _ in prompts.values() for release in releases]

    def answer(asking: tuple[str, Asked]) -> GeneratedAnswer | None:
        try:
            return client.generate(asking[0], asking[1], max_tokens=extent.max_tokens)
        except GatewayError as error:
            if error.status != 400:  # 400: this prompt doesn't suit the release, too long for one
                raise
            return None

    answers = in_threads(
        answer,
        asked,
        extent.threads,
        lambda done: report("generating answers", done, len(asked)),
    )
    mine, theirs = [], []
    for (_, words), candidate, baseline in zip(
        prompts.values(), answers[::2], answers[1::2], strict=True
    ):
        if candidate is not None and baseline is not None:
            mine.append(_measure_text(candidate, words))
            theirs.append(_measure_text(baseline, words))
    return mine, theirs


def _measure_text(answer: GeneratedAnswer, good_words: int | None) -> Written:
    words = answer.text.split()
    trigrams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return Written(
        words=len(words),
        cut_off=answer.finish_reason == "length",
        repeated_ratio=1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0,
        good_words=good_words,
    )


def _without_own_prompt(prompt: Sequence[Message], subject: Subject) -> list[Message]:
    """The prompt without a release's own; of one that was prepended the caller's part stays."""
    if not prompt or prompt[0].get("role") not in _SYSTEM:
        return list(prompt)
    said = join_parts(prompt[0].get("content"))
    if said in subject.own_prompts:
        return list(prompt[1:])
    if subject.prepends:
        for own in sorted(subject.own_prompts, key=len, reverse=True):
            if said.startswith(f"{own}\n\n"):
                return [{**prompt[0], "content": said[len(own) + 2 :]}, *prompt[1:]]
    return list(prompt)


def _good_answer(row: Mapping[str, Any]) -> str | None:
    if row["kind"] == "preference":
        return _text_of(row["chosen"][0])
    if row["kind"] == "supervised" or row.get("label"):
        return _text_of(row["completion"][0])
    return None


def _text_of(message: Message) -> str:
    return text_of(message.get("content"))


def _parts(row: Mapping[str, Any]) -> tuple[str, ...]:
    return ("chosen", "rejected") if row["kind"] == "preference" else ("completion",)


def _key(prompt: Asked, completion: Message) -> str:
    return json_in_order([list(prompt.messages), prompt.tools, prompt.template_kwargs, completion])
