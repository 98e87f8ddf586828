"""What a step minimises: the losses of its examples, one forward pass at a time.

Owns: how likelihood and preference terms are put together and weighed, so that the parts of the
forward passes add up to the mean over the step. Does not own: the formulas (`losses.py`), the order
of examples, the update (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from feedback.formats.shapes import Kind
from tuner.training.config import TrainingConfig
from tuner.training.layout import sequences_of
from tuner.training.losses import Metrics, dpo_loss, supervised_loss
from tuner.training.model import TunedModel
from tuner.training.references import LogProbs
from tuner.training.rendering import RenderedExample


class Objective:
    """The loss of supervised examples and preference pairs.

    Supervised examples: mean negative log-likelihood per completion token. Pairs: DPO, plus
    `sft_weight` times the same of the chosen answers. `references` holds the reference values of
    each pair by its content hash.
    """

    def __init__(self, config: TrainingConfig, model: TunedModel) -> None:
        self._config = config
        self._model = model
        self.references: dict[str, LogProbs] = {}

    def part(
        self, examples: Sequence[RenderedExample], whole: Sequence[RenderedExample]
    ) -> tuple[Tensor, Metrics]:
        """What `examples`, one forward pass, add to the mean loss of `whole`, and to its metrics.

        Pairs and supervised examples weigh as much as there are of them.
        """
        flat = iter(
            self._model.sequence_logprobs(
                [sequence for example in examples for sequence in sequences_of(example)]
            )
        )
        logprobs = [[next(flat) for _ in example.completions] for example in examples]
        parts: list[Tensor] = []
        metrics: Metrics = {}
        supervised = [
            (example, found[0])
            for example, found in zip(examples, logprobs, strict=True)
            if example.kind == "supervised"
        ]
        pairs = [
            (example, found)
            for example, found in zip(examples, logprobs, strict=True)
            if example.kind == "preference"
        ]
        if supervised:
            loss, found = _likelihood(supervised)
            share = _token_weight(examples, "supervised") / _token_weight(whole, "supervised")
            parts.append(_kind_share(whole, "supervised") * share * loss)
            add_metrics(metrics, found, share)
        if pairs:
            loss, found = self._pair_part(pairs, whole)
            parts.append(_kind_share(whole, "preference") * loss)
            add_metrics(metrics, found)
        total = torch.stack(parts).sum()
        metrics["loss"] = float(total.detach())
        return total, metrics

    def _pair_part(
        self,
        pairs: Sequence[tuple[RenderedExample, Sequence[Tensor]]],
        whole: Sequence[RenderedExample],
    ) -> tuple[Tensor, Metrics]:
        """What `pairs` add to the mean loss of the pairs in `whole`: DPO, and the likelihood."""
        gains: list[list[Tensor]] = []
        for example, found in pairs:
            reference = self.references[example.content_hash]
            gains.append(
                [
                    (policy - torch.from_numpy(values).to(policy.device)).sum()
                    for policy, values in zip(found, reference, strict=True)
                ]
            )
        chosen, rejected = (torch.stack(side) for side in zip(*gains, strict=True))
        weights = chosen.new_tensor([example.weight for example, _ in pairs])
        loss, metrics = dpo_loss(chosen, rejected, beta=self._config.beta, weights=weights)
        share = float(weights.sum()) / _weight(whole, "preference")
        metrics = {name: share * value for name, value in metrics.items()}
        metrics["dpo"] = share * float(loss.detach())
        total = share * loss

        likelihood, found_metrics = _likelihood([(example, found[0]) for example, found in pairs])
        share = _token_weight([example for example, _ in pairs], "preference") / _token_weight(
            whole, "preference"
        )
        if self._config.sft_weight is not None:
            total = total + self._config.sft_weight * share * likelihood
        metrics["chosen_nll"] = share * found_metrics["nll"]
        tokens = sum(
            len(example.completions[0]) for example in whole if len(example.completions) > 1
        )
        metrics["chosen_drop"] = -float(chosen.detach().sum()) / tokens
        return total, metrics


def _likelihood(examples: Sequence[tuple[RenderedExample, Tensor]]) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood per token, each token with its example's weight."""
    weights = [
        logprobs.new_full((len(logprobs),), example.weight) for example, logprobs in examples
    ]
    return supervised_loss(torch.cat([logprobs for _, logprobs in examples]), torch.cat(weights))


def _weight(examples: Sequence[RenderedExample], kind: Kind) -> float:
    return math.fsum(example.weight for example in examples if example.kind == kind)


def _token_weight(examples: Sequence[RenderedExample], kind: Kind) -> float:
    """Weights of all tokens of the (chosen) completions."""
    return math.fsum(
        example.weight * len(example.completions[0]) for example in examples if example.kind == kind
    )


def _kind_share(examples: Sequence[RenderedExample], kind: Kind) -> float:
    return _weight(examples, kind) / math.fsum(example.weight for example in examples)


def add_metrics(metrics: Metrics, found: Mapping[str, float], share: float = 1.0) -> None:
    """Add `share` of the metrics found to those of the whole."""
    for name, value in found.items():
        metrics[name] = metrics.get(name, 0.0) + share * value
