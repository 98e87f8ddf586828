"""What a step minimises: the losses of its examples, one forward pass at a time.

Owns: how the terms of the kinds of example are put together and weighed, so that the parts of the
forward passes add up to the mean over the step; and KTO's reference point, which has to be known
before the first of them. Does not own: the formulas (`losses.py`), the order of examples
(`order.py`), the update (`loop.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feedback.formats.shapes import Kind
from tuner.training.config import TrainingConfig
from tuner.training.labelled import class_weights, mismatch
from tuner.training.layout import pack, sequences_of
from tuner.training.losses import (
    Metrics,
    apo_zero_unpaired_loss,
    dpo_loss,
    kto_loss,
    supervised_loss,
)
from tuner.training.model import TunedModel
from tuner.training.references import LogProbs
from tuner.training.rendering import RenderedExample


@dataclass(frozen=True, slots=True)
class Whole:
    """All examples of a step, or of the validation: what the forward passes are parts of."""

    weights: Mapping[Kind, float]
    token_weights: Mapping[Kind, float]  #: of all tokens of the (chosen) completions
    chosen_tokens: int  #: of the pairs
    label_weights: Mapping[bool, float]
    true_tokens: int  #: of the answers labelled true
    kl: float  #: KTO's estimate, nats; not yet clamped

    def share_of(self, kind: Kind) -> float:
        """What the kind weighs in the mean."""
        return self.weights[kind] / math.fsum(self.weights.values())


class Objective:
    """The loss of supervised examples, preference pairs and labelled examples.

    Supervised examples: mean negative log-likelihood per completion token; a token that was copied
    from the answer that an example corrects weighs `copied_weight`. Pairs: DPO, plus `sft_weight`
    times the same of the chosen answers. Labelled examples: KTO, or its form without a
    KL term. `references` holds the reference values of each pair, labelled example and mismatched
    answer by its content hash.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: TunedModel,
        training: Sequence[RenderedExample],
        validation: Sequence[RenderedExample] = (),
    ) -> None:
        self._config = config
        self._model = model
        self._class_weights = class_weights(config, training)
        self._mismatched: Mapping[str, RenderedExample] = {}
        if config.labelled_loss == "kto":
            # Each side by itself: what validates has no part in what is trained.
            self._mismatched = {
                key: found
                for side in (validation, training)
                for key, found in mismatch(side, max_length=config.max_length).items()
            }
        self.references: dict[str, LogProbs] = {}

    @property
    def mismatched(self) -> list[RenderedExample]:
        """The mismatched answers, whose reference values are needed too."""
        return list(self._mismatched.values())

    def take_whole(self, examples: Sequence[RenderedExample]) -> Whole:
        """What is known of all of them before the first forward pass with gradients.

        For KTO that is a pass of its own without gradients, and without dropout.
        """
        by_kind: dict[Kind, list[RenderedExample]] = {}
        for example in examples:
            by_kind.setdefault(example.kind, []).append(example)
        labelled = by_kind.get("labelled", [])
        return Whole(
            weights={kind: _weigh(found) for kind, found in by_kind.items()},
            token_weights={kind: self._weigh_tokens(found) for kind, found in by_kind.items()},
            chosen_tokens=_count_tokens(by_kind.get("preference", [])),
            label_weights={
                label: _weigh(one for one in labelled if one.label is label)
                for label in (True, False)
            },
            true_tokens=_count_tokens(one for one in labelled if one.label),
            kl=self._estimate_kl(labelled),
        )

    def part(self, examples: Sequence[RenderedExample], whole: Whole) -> tuple[Tensor, Metrics]:
        """What `examples`, one forward pass, add to the mean loss of `whole`, and to its metrics.

        Each kind weighs as much as its examples do together.
        """
        flat = iter(
            self._model.sequence_logprobs(
                [sequence for example in examples for sequence in sequences_of(example)]
            )
        )
        by_kind: dict[Kind, list[_Computed]] = {}
        for example in examples:
            logprobs = [next(flat) for _ in example.completions]
            by_kind.setdefault(example.kind, []).append((example, logprobs))
        terms = {
            "supervised": self._supervised_part,
            "preference": self._pair_part,
            "labelled": self._labelled_part,
        }
        parts: list[Tensor] = []
        metrics: Metrics = {}
        for kind, computed in sorted(by_kind.items()):
            loss, found = terms[kind](computed, whole)
            parts.append(whole.share_of(kind) * loss)
            add_metrics(metrics, found)
        total = torch.stack(parts).sum()
        metrics["loss"] = float(total.detach())
        return total, metrics

    def _supervised_part(
        self, computed: Sequence[_Computed], whole: Whole
    ) -> tuple[Tensor, Metrics]:
        """What they add to the mean negative log-likelihood of the supervised ones in `whole`."""
        loss, found = self._likelihood(computed)
        share = self._weigh_tokens(one for one, _ in computed) / whole.token_weights["supervised"]
        return share * loss, {"nll": share * found["nll"]}

    def _pair_part(self, computed: Sequence[_Computed], whole: Whole) -> tuple[Tensor, Metrics]:
        """What they add to the mean loss of the pairs in `whole`: DPO, and the likelihood."""
        gains = [self._gains(example, logprobs) for example, logprobs in computed]
        chosen, rejected = (torch.stack(side) for side in zip(*gains, strict=True))
        weights = chosen.new_tensor([example.weight for example, _ in computed])
        loss, metrics = dpo_loss(chosen, rejected, beta=self._config.beta, weights=weights)
        share = float(weights.sum()) / whole.weights["preference"]
        metrics = {name: share * value for name, value in metrics.items()}
        metrics["dpo"] = share * float(loss.detach())
        total = share * loss

        likelihood, found_metrics = self._likelihood(computed)
        share = self._weigh_tokens(one for one, _ in computed) / whole.token_weights["preference"]
        if self._config.sft_weight is not None:
            total = total + self._config.sft_weight * share * likelihood
        metrics["chosen_nll"] = share * found_metrics["nll"]
        metrics["chosen_drop"] = -float(chosen.detach().sum()) / whole.chosen_tokens
        return total, metrics

    def _labelled_part(self, computed: Sequence[_Computed], whole: Whole) -> tuple[Tensor, Metrics]:
        """What they add to the mean loss of the labelled ones in `whole`."""
        config = self._config
        (true, true_weights), (false, false_weights) = (
            self._weighed_gains([(one, found) for one, found in computed if one.label is label])
            for label in (True, False)
        )
        desirable, undesirable = self._class_weights
        settings: dict[str, Any] = {
            "beta": config.beta,
            "desirable_weight": desirable,
            "undesirable_weight": undesirable,
            "weights": (true_weights, false_weights),
        }
        if config.labelled_loss == "kto":
            loss, found = kto_loss(true, false, true.new_tensor(whole.kl), **settings)
        else:
            loss, found = apo_zero_unpaired_loss(true, false, **settings)
        share = _weigh(one for one, _ in computed) / whole.weights["labelled"]
        metrics = {
            "labelled_loss": share * float(loss.detach()),
            "labelled_accuracy": share * found["accuracy"],
        }
        if config.labelled_loss == "kto":
            metrics["labelled_kl"] = share * max(whole.kl, 0.0)
        for name, label, of_label in (
            ("true_reward", True, true_weights),
            ("false_reward", False, false_weights),
        ):
            if name in found:
                part = float(of_label.sum()) / whole.label_weights[label]
                metrics[f"labelled_{name}"] = part * found[name]
        if len(true):
            metrics["labelled_drop"] = -float(true.detach().sum()) / whole.true_tokens
        return share * loss, metrics

    def _likelihood(self, computed: Sequence[_Computed]) -> tuple[Tensor, Metrics]:
        """Negative log-likelihood per token of the (chosen) completions, by the tokens' weights."""
        logprobs = torch.cat([found[0] for _, found in computed])
        weights = [weight for one, _ in computed for weight in self._token_weights(one)]
        return supervised_loss(logprobs, logprobs.new_tensor(weights))

    def _token_weights(self, example: RenderedExample) -> list[float]:
        """Of the (chosen) completion: the row's, and less for tokens that are only copied."""
        if example.changed is None:
            return [example.weight] * len(example.completions[0])
        copied = self._config.copied_weight
        return [example.weight * (1.0 if each else copied) for each in example.changed]

    def _weigh_tokens(self, examples: Iterable[RenderedExample]) -> float:
        """Weights of all tokens of the (chosen) completions."""
        return math.fsum(weight for one in examples for weight in self._token_weights(one))

    def _weighed_gains(self, computed: Sequence[_Computed]) -> tuple[Tensor, Tensor]:
        """What each answer gained on the base, and its weight; both empty without any."""
        gains = [gain for one, logprobs in computed for gain in self._gains(one, logprobs)]
        if not gains:
            nothing = torch.zeros(0, device=self._model.device)
            return nothing, nothing
        stacked = torch.stack(gains)
        return stacked, stacked.new_tensor([one.weight for one, _ in computed])

    def _gains(self, example: RenderedExample, logprobs: Sequence[Tensor]) -> list[Tensor]:
        """Policy minus reference log-probability of each completion, summed over its tokens."""
        reference = self.references[example.content_hash]
        return [
            (policy - torch.from_numpy(values).to(policy.device)).sum()
            for policy, values in zip(logprobs, reference, strict=True)
        ]

    def _estimate_kl(self, labelled: Sequence[RenderedExample]) -> float:
        """Mean gain of the mismatched answers, by the weights of the examples; 0 without any.

        In forward passes like those of the step, so examples that begin alike share their prompts.
        """
        weights: dict[str, float] = {}
        asked: dict[str, RenderedExample] = {}
        for example in labelled:
            if (found := self._mismatched.get(example.content_hash)) is not None:
                key = found.content_hash
                asked[key] = found
                weights[key] = weights.get(key, 0.0) + example.weight
        if not asked:
            return 0.0
        gains: list[float] = []
        with self._model.evaluating():
            for passed in pack(list(asked.values()), max_tokens=self._config.batch_tokens):
                logprobs = self._model.sequence_logprobs(
                    [sequence for example in passed for sequence in sequences_of(example)]
                )
                for example, found_logprobs in zip(passed, logprobs, strict=True):
                    (gain,) = self._gains(example, [found_logprobs])
                    gains.append(weights[example.content_hash] * float(gain))
        return math.fsum(gains) / math.fsum(weights.values())


_Computed = tuple[RenderedExample, Sequence[Tensor]]
"""An example, and the log-probabilities of each of its completions' tokens."""


def _weigh(examples: Iterable[RenderedExample]) -> float:
    return math.fsum(example.weight for example in examples)


def _count_tokens(examples: Iterable[RenderedExample]) -> int:
    """Tokens of the (chosen) completions."""
    return sum(len(example.completions[0]) for example in examples)


def add_metrics(metrics: Metrics, found: Mapping[str, float], share: float = 1.0) -> None:
    """Add `share` of the metrics found to those of the whole."""
    for name, value in found.items():
        metrics[name] = metrics.get(name, 0.0) + share * value
