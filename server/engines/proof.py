"""Does an engine really answer with these weights? The rule that reads a probe's figures.

Owns: the pure judgement. Does not own: asking the engine (`loading.py`) or the trainer's figures
(`tuner/training/probe.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

Figures = Sequence[Sequence[float]]

FLOOR_NATS = 1e-3
"""Smallest noise that is assumed:

two float32 implementations agree to about 3e-5, and luck may show less.
"""

NOISE_FACTOR = 3.0
BASE_SHARE = 1 / 3


class Outcome(StrEnum):
    PROVEN = "proven"  #: the engine's figures are the trainer's
    NO_EFFECT = "no_effect"  #: in the trainer itself the adapter hardly differs from the base
    NOT_ACTIVE = "not_active"  #: the engine answers like the base
    WRONG_WEIGHTS = "wrong_weights"  #: the engine answers like neither
    UNPROVEN = "unproven"  #: noise hides the difference


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome with its figures.

    They are mean absolute differences of log-probability per token, in nats.
    """

    outcome: Outcome
    noise: float  #: base in the trainer against base in the engine
    effect: float  #: adapter against base, in the trainer
    to_adapter: float  #: adapter in the engine against adapter in the trainer
    to_base: float  #: adapter in the engine against base in the engine

    def message(self) -> str:
        """One sentence for people."""
        figures = (
            f"distance to the trainer's figures {self.to_adapter:.4f}, "
            f"to the base {self.to_base:.4f}, noise {self.noise:.4f}, "
            f"effect in training {self.effect:.4f} nats per token"
        )
        words = {
            Outcome.PROVEN: "the engine answers with the adapter",
            Outcome.NO_EFFECT: "the adapter changes nothing that can be measured",
            Outcome.NOT_ACTIVE: "the engine took the adapter and still answers like the base",
            Outcome.WRONG_WEIGHTS: "the engine answers with other weights than were trained",
            Outcome.UNPROVEN: "this engine is too noisy to tell the adapter from the base",
        }
        return f"{words[self.outcome]} ({figures})"

    def as_details(self) -> dict[str, Any]:
        """For the audit log."""
        return asdict(self)


def judge(reference: Mapping[str, Any], engine_base: Figures, engine_adapter: Figures) -> Proof:
    """Compare an engine's log-probabilities with the trainer's `reference`.

    `reference` has `base` and `adapter`, each with one list a prompt, in nats. Proven: distance to
    the trainer's adapter at most three times the noise and at most a third of the distance to the
    base. The noise is the engine's own: how far its base is from the trainer's base.
    """
    trained_base, trained = reference["base"], reference["adapter"]
    noise = max(_distance(trained_base, engine_base), FLOOR_NATS)
    effect = _distance(trained, trained_base)
    to_adapter = _distance(trained, engine_adapter)
    to_base = _distance(engine_base, engine_adapter)

    def proof(outcome: Outcome) -> Proof:
        return Proof(outcome, noise, effect, to_adapter, to_base)

    if effect <= FLOOR_NATS:
        return proof(Outcome.NO_EFFECT)
    if to_adapter <= NOISE_FACTOR * noise and to_adapter <= BASE_SHARE * to_base:
        return proof(Outcome.PROVEN)
    if effect <= NOISE_FACTOR * noise:
        # Whatever the engine holds, the noise is as large as what would have to be seen.
        return proof(Outcome.UNPROVEN)
    if to_base <= BASE_SHARE * effect:
        return proof(Outcome.NOT_ACTIVE)
    if to_adapter <= BASE_SHARE * effect:
        # Clearly nearer to the adapter than to the base, further off than the base's own noise
        # explains.
        return proof(Outcome.UNPROVEN)
    return proof(Outcome.WRONG_WEIGHTS)


def _distance(left: Figures, right: Figures) -> float:
    differences = [
        abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    ]
    return fmean(differences)
