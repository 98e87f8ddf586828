"""The losses: pure functions of log-probabilities.

Owns: the formulas and what is measured beside them. Every loss is a mean, so the loop weighs the
parts of a step by their share. Does not own: models, reference values, batching.
"""

from __future__ import annotations

import torch
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
    return loss, {
        "accuracy": float(_mean(_wins(margins), weights)),
        "margin": float(_mean(margins.detach(), weights)),
        "chosen_reward": float(_mean(beta * chosen.detach(), weights)),
        "rejected_reward": float(_mean(beta * rejected.detach(), weights)),
    }


def kto_loss(
    true: Tensor,
    false: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Metrics]:
    """KTO: mean of `λ_D (1 − σ(β (true − z)))` and `λ_U (1 − σ(β (z − false)))`, `z = max(0, kl)`.

    Ethayarajh et al. 2024, eq. 7 and 8: https://arxiv.org/abs/2402.01306.

    `true`, `false`: policy minus reference log-probability of the answers so labelled, summed over
    completion tokens; `(D,)` and `(U,)`, nats, one of them may be empty. `kl`: the mean of the same
    over mismatched answers, a scalar; no gradient goes through it. `desirable_weight` is λ_D,
    `undesirable_weight` λ_U. `weights`: of the shapes of `true` and `false`; None is all ones. An
    answer at the reference point `z` counts half in `accuracy`.
    """
    point = kl.detach().clamp(min=0)
    margins = beta * torch.cat((true - point, point - false))
    sides = torch.cat(
        (torch.full_like(true, desirable_weight), torch.full_like(false, undesirable_weight))
    )
    joined = None if weights is None else torch.cat(weights)
    loss = _mean(sides * torch.sigmoid(-margins), joined)
    metrics = {"accuracy": float(_mean(_wins(margins), joined))}
    of_true, of_false = (None, None) if weights is None else weights
    if len(true):
        metrics["true_reward"] = float(_mean(beta * true.detach(), of_true))
    if len(false):
        metrics["false_reward"] = float(_mean(beta * false.detach(), of_false))
    return loss, metrics


def apo_zero_unpaired_loss(
    true: Tensor,
    false: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Metrics]:
    """APO-zero for unpaired answers: mean of `λ_D (1 − σ(β true))` and `λ_U σ(β false)`.

    D'Oosterlinck et al. 2024, eq. 7, each answer by itself: https://arxiv.org/abs/2408.06266. It is
    KTO whose reference point stays at zero, so all else is as in `kto_loss`.
    """
    return kto_loss(
        true,
        false,
        true.new_zeros(()),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        weights=weights,
    )


def _wins(margins: Tensor) -> Tensor:
    """1 where the margin is positive, a half where it is zero."""
    found = margins.detach()
    return (found > 0).float() + 0.5 * (found == 0).float()


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (weights * values).sum() / weights.sum()
