"""Guards: what must not happen to a model while it is tuned.

Owns: when a run is stopped and the reason that people read. A stopped run leaves no adapter. Does
not own: the guard on generated answers, which compares releases after training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tuner.training.layout import Layout, Sequence_
from tuner.training.model import TunedModel
from tuner.training.rendering import RenderedExample

_SAMPLE_EXAMPLES = 4
_SAMPLE_TOKENS = 16
_CONTEXT_TOKENS = 128


class GuardStopped(Exception):
    """A guard ended the run; `code` is stable, `message` for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def check_finite(name: str, value: float, step: int) -> None:
    """Stop on NaN or infinity in the loss or the gradients."""
    if not math.isfinite(value):
        raise GuardStopped(
            "guard_not_finite",
            f"The {name} of step {step} is {value}, so training has diverged; "
            "use a smaller learning rate, or look for broken examples.",
        )


def check_drops(metrics: Mapping[str, float], limit: float | None, step: int) -> None:
    """Stop when good answers have become less likely by more than `limit` nats per token.

    Those are the chosen ones of pairs and the ones labelled true.
    """
    for name, answers, remedy in (
        ("chosen_drop", "chosen answers", "sft_weight"),
        ("labelled_drop", "answers labelled true", "beta"),
    ):
        drop = metrics.get(name, -math.inf)
        if limit is not None and drop > limit:
            raise GuardStopped(
                "guard_chosen_drop",
                f"At step {step} the {answers} have lost {drop:.2f} nats of log-probability per "
                f"token against the base, more than {limit:g}; use a smaller learning rate or a "
                f"larger {remedy}.",
            )


def check_kl(kl: float, limit: float | None, step: int) -> None:
    """Stop when the tuned model has moved further than `limit` nats per token from the base."""
    if limit is not None and not kl <= limit:  # NaN stops too
        raise GuardStopped(
            "guard_kl",
            f"At step {step} KL(tuned || base) is {kl:.2f} nats per token, more than {limit:g}; "
            "use a smaller learning rate or fewer epochs.",
        )


class KlSample:
    """A fixed few completion tokens on which the tuned model is compared with its base.

    At most 64 tokens of four examples, which their hashes alone choose.
    """

    def __init__(self, model: TunedModel, examples: Sequence[RenderedExample]) -> None:
        chosen = sorted(examples, key=lambda example: example.content_hash)[:_SAMPLE_EXAMPLES]
        sequences: list[Sequence_] = [
            (example.prompt[-_CONTEXT_TOKENS:], example.completions[0][:_SAMPLE_TOKENS])
            for example in chosen
        ]
        self._model = model
        self._layouts = model.layouts(sequences)
        with model.base_only():
            self._base = [self._log_softmax(layout) for layout in self._layouts]

    def measure(self) -> float:
        """KL(tuned || base), mean over the tokens, nats: `Σ p log(p / q)` over the vocabulary."""
        total, count = 0.0, 0
        with self._model.evaluating():
            for layout, base in zip(self._layouts, self._base, strict=True):
                tuned = self._log_softmax(layout)
                total += float((tuned.exp() * (tuned - base)).sum())
                count += len(tuned)
        return total / count

    def _log_softmax(self, layout: Layout) -> Tensor:
        return torch.log_softmax(self._model.logits(layout), dim=-1)
