"""The methods of tuning: what each one reads and needs, and what a job may set.

Owns: the one table that the API, the command line, the worker and the trainer read. Imports neither
torch nor a database. Does not own the refusals made from it (`tuning.py`), the trainer's whole
configuration (`training/config.py`) or the losses (`training/objective.py`).

A method has an objective, is accepted by the API under `method.<its name>`, and has its line in
`docs/administration.md`; tests hold these to the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from feedback.numbers import whole

if TYPE_CHECKING:
    from feedback.formats.shapes import Kind

AUTO: Final = "auto"
"""OpenAI's word for a hyperparameter left to the default."""

TRAINED_TOKENS: Final = 1024  #: longest example of a tuning job that says nothing of it


class Method(StrEnum):
    """What the examples of a tuning job teach by."""

    SUPERVISED = "supervised"  #: the negative log-likelihood of completions
    DPO = "dpo"  #: preference pairs against the base; supervised examples may be mixed in
    KTO = "kto"  #: labelled examples against the base
    COMBINED = "combined"  #: all kinds at once


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What one method reads, needs and starts from."""

    reads: tuple[Kind, ...]  #: kinds of example it trains on, in the order of a job's files
    needs: tuple[Kind, ...]  #: of one of these kinds there must be an example
    to_add: str  #: what people do to have such examples
    #: the trainer's settings that this method starts from, where methods differ
    defaults: Mapping[str, float | str] = field(default_factory=dict)


METHODS: Final[Mapping[Method, MethodFacts]] = {
    Method.SUPERVISED: MethodFacts(
        reads=("supervised",),
        needs=("supervised",),
        to_add="add corrections (kind 'correction')",
        defaults={"learning_rate": 2e-4, "epochs": 3},
    ),
    # Corrections too where a set has them: a likelihood term beside the pairs.
    Method.DPO: MethodFacts(
        reads=("preference", "supervised"),
        needs=("preference",),
        to_add="add comparisons, or corrections that change much of an answer",
        defaults={"learning_rate": 1e-5, "epochs": 2},
    ),
    Method.KTO: MethodFacts(
        reads=("labelled",),
        needs=("labelled",),
        to_add="add ratings or stars",
        defaults={"learning_rate": 2e-4, "epochs": 3, "labelled_loss": "kto"},
    ),
    # KTO's estimate is the mean over a step's labelled examples. Here these are two or three of the
    # default's eight, so it would be noise. Rate and epochs are where a hundred mixed judgements
    # taught SmolLM2-135M an ending that it never had and general text stayed within 3 %.
    Method.COMBINED: MethodFacts(
        reads=("preference", "supervised", "labelled"),
        needs=("preference", "supervised", "labelled"),
        to_add="add corrections, comparisons, ratings or stars",
        defaults={"learning_rate": 4e-4, "epochs": 4, "labelled_loss": "apo_zero_unpaired"},
    ),
}

_ALL: Final = frozenset(Method)
_COMBINED: Final = frozenset({Method.COMBINED})
_LABELLED: Final = frozenset(
    method for method, facts in METHODS.items() if "labelled" in facts.reads
)


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """What a job may set: the trainer's setting behind it, type and range, and what it means."""

    setting: str
    type: type[int] | type[float]
    minimum: float
    maximum: float
    default: float | None  #: None: the method's own (`MethodFacts.defaults`)
    meaning: str
    methods: frozenset[Method] = _ALL  #: those that it changes anything in
    openai: bool = False  #: OpenAI's API has it, and shows it in every job

    @property
    def expected(self) -> str:
        """What may be given, for a sentence."""
        number = "a whole number" if self.type is int else "a number"
        return f"{number} from {self.minimum:g} to {self.maximum:g}"

    def find_value(self, given: Any) -> int | float | None:
        """The value as the trainer takes it; None where it is none."""
        value: Any = whole(given) if self.type is int else given
        if isinstance(value, bool) or not isinstance(value, int | self.type):
            return None
        return value if self.minimum <= value <= self.maximum else None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a job may choose, as a `Hyperparameter` with words in the place of numbers."""

    setting: str
    choices: tuple[str, ...]
    default: str | None  #: None: the method's own
    meaning: str
    methods: frozenset[Method] = _ALL
    openai: bool = False

    @property
    def expected(self) -> str:
        """What may be given, for a sentence."""
        return " or ".join(map(repr, self.choices))

    def find_value(self, given: Any) -> str | None:
        """The value as the trainer takes it; None where it is none."""
        return given if given in self.choices else None


HYPERPARAMETERS: Final[Mapping[str, Hyperparameter | Choice]] = {
    "n_epochs": Hyperparameter("epochs", int, 1, 50, None, "passes over the examples", openai=True),
    "batch_size": Hyperparameter("batch_size", int, 1, 256, 8, "examples per step", openai=True),
    "learning_rate": Hyperparameter("learning_rate", float, 1e-8, 1.0, None, "peak learning rate"),
    "learning_rate_multiplier": Hyperparameter(
        "learning_rate",
        float,
        1e-3,
        1e3,
        1.0,
        "scales the method's default learning rate",
        openai=True,
    ),
    "beta": Hyperparameter(
        "beta",
        float,
        1e-3,
        10.0,
        0.1,
        "how closely DPO and KTO are held to the base",
        methods=_ALL - {Method.SUPERVISED},
        openai=True,
    ),
    "sft_weight": Hyperparameter(
        "sft_weight",
        float,
        1e-6,
        10.0,
        1.0,
        "of the likelihood term in DPO",
        methods=frozenset({Method.DPO, Method.COMBINED}),
    ),
    "copied_weight": Hyperparameter(
        "copied_weight",
        float,
        1e-6,
        1.0,
        0.1,
        "of tokens that a correction repeats from the answer",
        methods=_ALL - {Method.KTO},
    ),
    "labelled_loss": Choice(
        "labelled_loss",
        ("kto", "apo_zero_unpaired"),
        None,
        "loss of labelled examples",
        methods=_LABELLED,
    ),
    "supervised_weight": Hyperparameter(
        "supervised_weight", float, 1e-6, 1e3, 1.0, "of each supervised example", methods=_COMBINED
    ),
    "preference_weight": Hyperparameter(
        "preference_weight", float, 1e-6, 1e3, 0.5, "of each preference pair", methods=_COMBINED
    ),
    # The losses of labelled answers and pairs sum over tokens, the likelihood is a mean over them.
    "labelled_weight": Hyperparameter(
        "labelled_weight", float, 1e-6, 1e3, 0.02, "of each labelled example", methods=_COMBINED
    ),
    "r": Hyperparameter("r", int, 1, 512, 16, "rank of the adapter"),
    # Whole, as in peft and vLLM.
    "lora_alpha": Hyperparameter("lora_alpha", int, 1, 4096, 32, "scale of the adapter"),
    "max_length": Hyperparameter(
        "max_length", int, 16, 131_072, TRAINED_TOKENS, "longest example, tokens"
    ),
}
"""By their names in the API: OpenAI's where it has one, the trainer's otherwise."""


def default_of(name: str, method: Method = Method.SUPERVISED) -> Any:
    """The value of a hyperparameter that a job leaves to the method; None where it has none."""
    known = HYPERPARAMETERS[name]
    return METHODS[method].defaults.get(known.setting) if known.default is None else known.default


def list_shown(method: Method | None = None) -> list[str]:
    """Hyperparameters that OpenAI shows in a job of `method`; None: of any, its older list."""
    methods = _ALL if method is None else {method}
    return [
        name for name, known in HYPERPARAMETERS.items() if known.openai and methods <= known.methods
    ]


def name_methods(methods: Collection[Method] = _ALL) -> str:
    """These methods, quoted, for a sentence."""
    *first, last = (repr(str(method)) for method in METHODS if method in methods)
    return f"{', '.join(first)} or {last}" if first else last
