"""The configuration of one tuning job, and the environment of its child process.

Owns: `TrainingConfig` and its JSON form, `trainer_environment`. Imports no torch, so the process
that starts the child builds it. Does not own: the defaults (`tuner/methods.py`), or where the
values come from (a job's hyperparameters, a deployment's policy).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tuner.methods import METHODS, Method, default_of

PARENT_VARIABLE: Final = "BURNISH_TRAINER_PARENT"


class ExitCode:
    """Exit codes of the child; 1, Python's own for a crash, is the one worth another attempt."""

    FINISHED = 0
    CRASHED = 1
    REFUSED = 2  #: configuration or data; the same again would fail the same way
    GUARDED = 3  #: a guard stopped the run


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the setting."""


# Where things lie, and what is only about the way there: none of it changes the adapter.
_NOT_IDENTITY: Final = frozenset(
    {"job_id", "base_path", "train_files", "validation_file", "output_dir", "references_dir"}
    | {"warm_start"}
    | {"data_hash", "checkpoint_every_steps", "max_rank", "max_chosen_drop", "max_kl"}
)


# Without labelled examples they have no effect. Absent then, so that a run that an earlier version
# began is still the same run.
_OF_LABELLED: Final = frozenset(
    {"labelled_loss", "desirable_weight", "undesirable_weight"}
    | {"supervised_weight", "preference_weight", "labelled_weight"}
)


def _default_in(name: str, data: Mapping[str, Any]) -> Any:
    # Without a valid method its own error is the one to show.
    return default_of(name, data.get("method", Method.SUPERVISED))


class TrainingConfig(BaseModel):
    """One tuning job. Lengths in tokens, log-probabilities in nats; None switches off.

    `learning_rate`, `epochs` and `labelled_loss` may be given as None for the method's own default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    job_id: str
    method: Method
    base_path: Path = Field(description="Directory of the base model.")
    base_name: str = Field(description="Public name of the base, written into the adapter.")
    base_revision: str | None = None
    train_files: tuple[Path, ...] = Field(min_length=1, description="JSON Lines.")
    validation_file: Path | None = Field(
        default=None,
        description="JSON Lines that validate and never train; None: `validation_share` of the "
        "training rows.",
    )
    output_dir: Path
    references_dir: Path = Field(description="Cache of the base's log-probabilities.")

    seed: int = Field(default=0, ge=0, lt=2**63)
    r: int = Field(default=default_of("r"), ge=1, description="Rank of the adapter.")
    max_rank: int = Field(default=512, ge=1, description="Largest rank that the engines serve.")
    lora_alpha: float = Field(default=default_of("lora_alpha"), gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Last parts of module names; None: all linear layers.",
    )
    warm_start: Path | None = Field(default=None, description="Folder of an adapter to go on from.")

    learning_rate: float = Field(default_factory=partial(_default_in, "learning_rate"), gt=0)
    epochs: int = Field(default_factory=partial(_default_in, "n_epochs"), ge=1, le=100)
    batch_size: int = Field(
        default=default_of("batch_size"), ge=1, description="Examples per optimizer step."
    )
    batch_tokens: int = Field(default=512, ge=1, description="Tokens per forward pass, at most.")
    max_length: int = Field(
        default=default_of("max_length"), ge=2, description="Longer examples are dropped."
    )
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    beta: float = Field(default=default_of("beta"), gt=0, description="Temperature of DPO and KTO.")
    sft_weight: float | None = Field(
        default=default_of("sft_weight"),
        gt=0,
        description="Weight of the chosen answers' own likelihood beside DPO.",
    )

    copied_weight: float = Field(
        default=default_of("copied_weight"),
        gt=0,
        le=1,
        description="Weight of tokens in a better answer that are copied from the worse one.",
    )

    labelled_loss: Literal["kto", "apo_zero_unpaired"] | None = Field(
        default_factory=partial(_default_in, "labelled_loss"),
        description="KTO, or its form without a KL term; None where no labelled examples are read.",
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Weight of answers labelled true in KTO; None: from how many there are.",
    )
    undesirable_weight: float | None = Field(
        default=None, gt=0, description="The same of answers labelled false."
    )
    supervised_weight: float = Field(
        default=default_of("supervised_weight"),
        gt=0,
        description="Weight of each supervised example where a run combines the kinds.",
    )
    preference_weight: float = Field(
        default=default_of("preference_weight"), gt=0, description="The same of each pair."
    )
    labelled_weight: float = Field(
        default=default_of("labelled_weight"),
        gt=0,
        description="The same of each labelled example.",
    )

    validation_share: float = Field(default=0.1, ge=0, lt=1)
    min_validation: int = Field(
        default=8, ge=1, description="With fewer held-back examples than this, all of them train."
    )
    patience: int | None = Field(
        default=1, ge=1, description="Epochs without a better validation loss before the run ends."
    )
    checkpoint_every_steps: int = Field(default=20, ge=1)
    threads: int = Field(default=2, ge=1)
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="Of the base; None: float32 on a CPU, bfloat16 on CUDA."
    )

    max_chosen_drop: float | None = Field(
        default=1.0,
        gt=0,
        description="The run stops when answers that were chosen, or labelled true, lost more than "
        "this per token.",
    )
    max_kl: float | None = Field(
        default=5.0, gt=0, description="The run stops when KL(tuned || base) per token passes this."
    )
    data_hash: str | None = Field(
        default=None, description="Of the data set; goes to the manifest."
    )

    @model_validator(mode="before")
    @classmethod
    def _none_is_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {
                key: value
                for key, value in values.items()
                if value is not None or key not in ("learning_rate", "epochs", "labelled_loss")
            }
        return values

    @model_validator(mode="after")
    def _rank_is_served(self) -> TrainingConfig:
        if self.r > self.max_rank:
            raise ValueError(
                f"r is {self.r}, above {self.max_rank}, the largest rank that engines serve"
            )
        return self

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainingConfig:
        """Read a configuration.

        An unknown key, a wrong type or a value out of range raises `ConfigError`.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                key = ".".join(str(part) for part in problem["loc"]) or "configuration"
                if problem["type"] == "extra_forbidden":
                    lines.append(f"unknown setting {key!r}")
                else:
                    lines.append(f"{key!r}: {problem['msg']}")
            raise ConfigError("; ".join(lines)) from None

    def to_json(self) -> str:
        """Every setting, sorted, as `from_json` reads it."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"

    def fingerprint(self) -> str:
        """Hash (hex) of all settings that the adapter depends on.

        Two runs with the same one are the same run, if their files are: the files' contents are the
        caller's to add.
        """
        left_out = set(_NOT_IDENTITY)
        if "labelled" not in METHODS[self.method].reads:
            left_out |= _OF_LABELLED
        settings = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def trainer_environment(threads: int) -> dict[str, str]:
    """Return the variables to set for the child, beside the parent's own.

    Call it in the process that starts the child, from a thread that lives as long as the child may:
    Linux ends the child when that thread ends.
    """
    never = str(4 * 1024**3)
    return {
        # glibc returns freed activations to the kernel and faults them in again at every step: a
        # third of the speed.
        "MALLOC_MMAP_THRESHOLD_": never,
        "MALLOC_TRIM_THRESHOLD_": never,
        "MALLOC_TOP_PAD_": str(64 * 1024**2),
        # Threads that spin at their barriers stop each other where an engine wants the same cores:
        # less than a quarter of the speed on a machine with four times as much to do as cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic matrix products on CUDA
        "PYTHONUNBUFFERED": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }
