"""What a run learns from, and what it is validated by.

Owns: the validation slice or file, what is left out for being near it, what each kind of example
weighs, and the refusal where nothing is left to learn. Does not own: the reading of rows
(`rows.py`) or rendering (`rendering.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from feedback.curation.extract import build_near_hash
from feedback.formats.shapes import Kind
from tuner.methods import METHODS, Method
from tuner.training.config import TrainingConfig
from tuner.training.rendering import WHAT_TO_DO, RenderedExample, Renderer
from tuner.training.rows import DataError, Row, group_of, name_of


class NothingToLearn(DataError):
    """No example of the kind that the method learns from is left."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What a run learns from, what it is validated by, and how many were dropped, by reason."""

    training: Sequence[RenderedExample]
    validation: Sequence[RenderedExample]
    drops: Mapping[str, int]
    validation_drops: Mapping[str, int] = field(default_factory=dict)


def share_examples(config: TrainingConfig, renderer: Renderer, rows: Sequence[Row]) -> Examples:
    """A share of the rows validates."""
    rendered = renderer.render(rows, METHODS[config.method].reads)
    _check_teaches(config, renderer, rendered.examples, rendered.drops)
    examples = weigh_kinds(config, rendered.examples)
    training, validation = split_validation(
        examples, share=config.validation_share, minimum=config.min_validation
    )
    if not _teaches(config.method, training):  # the slice took the last of them
        training, validation = examples, []
    return Examples(training, validation, rendered.drops)


def hold_examples(
    config: TrainingConfig, renderer: Renderer, rows: Sequence[Row], held: Sequence[Row]
) -> Examples:
    """A file of its own validates: all of it, and nothing that is near it trains."""
    kinds = METHODS[config.method].reads
    validation = renderer.render(held, kinds)
    if not validation.examples:
        assert config.validation_file is not None
        raise DataError(
            f"{name_of(config.validation_file)}: nothing is left to validate with "
            f"({_describe_drops(validation.drops) or 'the file is empty'})"
        )
    kept = leave_out_near(rows, [row for row in held if row.kind in kinds])
    rendered = renderer.render(kept, kinds)
    near = len(rows) - len(kept)
    drops = {**rendered.drops, **({"near_validation": near} if near else {})}
    _check_teaches(config, renderer, rendered.examples, drops)
    return Examples(
        weigh_kinds(config, rendered.examples),
        weigh_kinds(config, validation.examples),
        drops,
        validation.drops,
    )


def weigh_kinds(
    config: TrainingConfig, examples: Sequence[RenderedExample]
) -> list[RenderedExample]:
    """Each example with the weight of its kind, where the method takes one for each."""
    if config.method != Method.COMBINED:
        return list(examples)
    weights: Mapping[Kind, float] = {
        "supervised": config.supervised_weight,
        "preference": config.preference_weight,
        "labelled": config.labelled_weight,
    }
    return [replace(one, weight=weights[one.kind] * one.weight) for one in examples]


def leave_out_near(rows: Sequence[Row], validation: Sequence[Row]) -> list[Row]:
    """`rows` that may train beside a file of `validation` rows, which never do.

    What goes begins with the same user turn as one of these, as the parts of a conversation do, or
    has the words of its prompt: what curation takes for near.
    """
    groups = {group_of(row.prompt) for row in validation}
    words = {build_near_hash(row.prompt) for row in validation}
    return [
        row
        for row in rows
        if group_of(row.prompt) not in groups and build_near_hash(row.prompt) not in words
    ]


def split_validation(
    examples: Sequence[RenderedExample], *, share: float, minimum: int
) -> tuple[list[RenderedExample], list[RenderedExample]]:
    """Split the examples into training and validation, in that order.

    Validation is `share` of the groups, chosen by their hash alone. With fewer than `minimum` of
    them, or nothing left to train on, everything trains and validation is empty.
    """
    held = [example for example in examples if int(example.group[:8], 16) < share * 2**32]
    if len(held) < minimum or len(held) == len(examples):
        return list(examples), []
    return [example for example in examples if int(example.group[:8], 16) >= share * 2**32], held


def _check_teaches(
    config: TrainingConfig,
    renderer: Renderer,
    examples: Sequence[RenderedExample],
    drops: Mapping[str, int],
) -> None:
    if _teaches(config.method, examples):
        return
    too_long = ""
    if "too_long" in drops:
        too_long = (
            f" The longest row has {renderer.longest_tokens} tokens, and max_length allows "
            f"{config.max_length}."
        )
    raise NothingToLearn(
        f"Nothing is left to train on: method {str(config.method)!r} needs "
        f"{' or '.join(METHODS[config.method].needs)} examples and found none "
        f"({_describe_drops(drops) or 'the files are empty'}).{too_long}"
    )


def _teaches(method: Method, examples: Sequence[RenderedExample]) -> bool:
    return any(example.kind in METHODS[method].needs for example in examples)


def _describe_drops(drops: Mapping[str, int]) -> str:
    reasons = (
        f"{count} dropped as {reason} ({WHAT_TO_DO[reason]})" for reason, count in drops.items()
    )
    return "; ".join(reasons)
