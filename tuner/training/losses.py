"""The losses: pure functions of log-probabilities.

Owns: the formulas and what is measured beside them. Every loss is a mean, so the loop weighs the
parts of a step by their share. Does not own: models, reference values, batching.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

Metrics = dict[str, float]


def supervised_loss(logprobs: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood per completion token, `-Σ w log p / Σ w`.

    `logprobs`: log-probability of each completion token, `(T,)`, nats. `weights`: of the same
    shape; None is all ones.
    """
    loss = -_mean(logprobs, weights)
    return loss, {"nll": float(loss.detach())}


def dpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, weights: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Sigmoid DPO, `-log σ(β (chosen − rejected))` (Rafailov et al. 2023, eq. 7).

    Paper: https://arxiv.org/abs/2305.18290.

    `chosen`, `rejected`: policy minus reference log-probability, summed over completion tokens;
    `(B,)`, nats. `weights`: of the same shape; None is all ones. A pair whose answers gained
    equally counts half in `accuracy`.
    """
    margins = beta * (chosen - rejected)
    loss = -_mean(functional.logsigmoid(margins), weights)
    wins = (margins.detach() > 0).float() + 0.5 * (margins.detach() == 0).float()
    return loss, {
        "accuracy": float(_mean(wins, weights)),
        "margin": float(_mean(margins.detach(), weights)),
        "chosen_reward": float(_mean(beta * chosen.detach(), weights)),
        "rejected_reward": float(_mean(beta * rejected.detach(), weights)),
    }


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (weights * values).sum() / weights.sum()
