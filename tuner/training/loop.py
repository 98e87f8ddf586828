"""The training loop: from a configuration to an adapter, the same bytes every time.

Owns: the steps, validation and early stop, what a checkpoint holds, and what is told on the way.
Does not own: the order of examples, losses, guards, the model, or the process around it
(`__main__.py`).

The order of an epoch follows from seed, epoch and the examples alone, each example's reference
values from the example alone, and a checkpoint holds everything else that a step depends on. So a
run that was killed and resumed ends with the adapter that it would have ended with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from tuner.base_models import read_control_tokens, read_template
from tuner.training.checkpoint import Checkpoint, Checkpoints
from tuner.training.config import TrainingConfig
from tuner.training.data import Examples, hold_examples, share_examples
from tuner.training.guards import KlSample, check_drops, check_finite, check_kl
from tuner.training.identity import run_identity
from tuner.training.layout import pack, sequences_of
from tuner.training.losses import Metrics
from tuner.training.model import TunedModel, get_end_token_ids, load_tokenizer
from tuner.training.objective import Objective, add_metrics
from tuner.training.order import epoch_order
from tuner.training.probe import build_probe
from tuner.training.references import LogProbs, References
from tuner.training.rendering import RenderedExample, Renderer
from tuner.training.rows import read_rows

logger = logging.getLogger(__name__)

Emit = Callable[[dict[str, Any]], None]

ADAPTER_FOLDER: Final = "adapter"
CHECKPOINTS_FOLDER: Final = "checkpoints"

_KL_EVERY_STEPS = 10
_SECONDS_BETWEEN_EVENTS = 0.5


def train(config: TrainingConfig, emit: Emit) -> None:
    """Train to the end, from the newest checkpoint where there is one; `emit` gets every event.

    The last event is `finished`, with the folder of the adapter. Raises `ConfigError` and
    `DataError` for what would fail the same way again, `GuardStopped` when a guard ends the run.
    """
    _prepare_torch(config)
    rows = read_rows(config.train_files)
    held = None if config.validation_file is None else read_rows([config.validation_file])
    identity = run_identity(config)
    # What can't be trained on is told before the model takes its time and its memory.
    tokenizer = load_tokenizer(config.base_path)
    renderer = Renderer(
        tokenizer,
        get_end_token_ids(config.base_path, tokenizer),
        template=replace(
            read_template(config.base_path), special_tokens=tokenizer.special_tokens_map
        ),
        control_tokens=read_control_tokens(config.base_path),
        max_length=config.max_length,
    )
    if held is None:
        examples = share_examples(config, renderer, rows)
    else:
        examples = hold_examples(config, renderer, rows, held)
    model = TunedModel(config, tokenizer)
    _Run(config, identity, model, renderer, examples, emit).train()


def _prepare_torch(config: TrainingConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The learning rate of a step: linear warmup to the peak, then half a cosine to zero.

    Steps are numbered 0 … `steps` - 1; none of them has rate zero.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@dataclass(slots=True)
class _Progress:
    """Where a run stands, beside its weights."""

    step: int = 0  #: optimizer steps that are done
    epoch: int = 0  #: epochs that are done, validation included
    best_loss: float | None = None  #: of validation
    best_epoch: int | None = None
    epochs_without_better: int = 0
    ended: bool = False  #: by early stop
    last: dict[str, float] = field(default_factory=dict)  #: metrics of the last step


class _Run:
    """One run over rendered examples."""

    def __init__(
        self,
        config: TrainingConfig,
        identity: Mapping[str, Any],
        model: TunedModel,
        renderer: Renderer,
        examples: Examples,
        emit: Emit,
    ) -> None:
        self._config = config
        self._identity = identity
        self._model = model
        self._renderer = renderer
        self._training = examples.training
        self._validation = examples.validation
        self._drops = examples.drops
        self._validation_drops = examples.validation_drops
        self._emit = emit
        self._steps_per_epoch = math.ceil(len(self._training) / config.batch_size)
        self._steps = self._steps_per_epoch * config.epochs
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._checkpoints = Checkpoints(config.output_dir / CHECKPOINTS_FOLDER, digest)
        self._parameters = model.parameters
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._progress = _Progress()
        self._best: dict[str, Tensor] = {}
        self._objective = Objective(config, model, self._training, self._validation)
        self._kl: KlSample | None = None
        self._told = -math.inf

    def train(self) -> None:
        """All epochs that are left, and the adapter."""
        refused = self._resume()
        self._tell_start(refused)
        self._compute_references()
        if self._config.max_kl is not None:
            self._kl = KlSample(self._model, self._training)
        progress = self._progress
        if self._validation and progress.step == 0:
            self._emit({"event": "validation", "step": 0, "epoch": 0, **self._validate()})
        while progress.epoch < self._config.epochs and not progress.ended:
            self._train_epoch()
        self._finish()

    def _train_epoch(self) -> None:
        config, progress = self._config, self._progress
        order = epoch_order(
            [example.kind for example in self._training],
            config.batch_size,
            seed=config.seed,
            epoch=progress.epoch,
        )
        first = progress.step - progress.epoch * self._steps_per_epoch
        for index in range(first, self._steps_per_epoch):
            chosen = order[index * config.batch_size : (index + 1) * config.batch_size]
            self._step([self._training[number] for number in chosen])
            if progress.step % config.checkpoint_every_steps == 0 and (
                index + 1 < self._steps_per_epoch  # the epoch's own follows its validation
            ):
                self._checkpoint()
        self._guard_kl()
        progress.epoch += 1
        if self._validation:
            self._judge_epoch()
        self._checkpoint()

    def _step(self, examples: Sequence[RenderedExample]) -> None:
        """One update of the weights by all of `examples`."""
        config, progress = self._config, self._progress
        started = time.monotonic()
        rate = learning_rate(config, progress.step, self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        number = progress.step + 1
        metrics: Metrics = {}
        whole = self._objective.take_whole(examples)
        for passed in pack(examples, max_tokens=config.batch_tokens):
            loss, found = self._objective.part(passed, whole)
            check_finite("loss", float(loss.detach()), number)
            torch.autograd.backward(loss)
            add_metrics(metrics, found)
        norm = torch.nn.utils.clip_grad_norm_(
            self._parameters.values(), config.max_grad_norm or math.inf
        )
        check_finite("gradient", float(norm), number)
        check_drops(metrics, config.max_chosen_drop, number)
        self._optimizer.step()
        progress.step = number
        progress.last = {**metrics, "grad_norm": float(norm)}
        if number % _KL_EVERY_STEPS == 0:
            self._guard_kl()
        self._tell_step(rate, sum(example.tokens for example in examples), started)

    def _validate(self) -> Metrics:
        metrics: Metrics = {}
        whole = self._objective.take_whole(self._validation)
        with self._model.evaluating():
            for passed in pack(self._validation, max_tokens=self._config.batch_tokens):
                _, found = self._objective.part(passed, whole)
                add_metrics(metrics, found)
        return metrics

    def _judge_epoch(self) -> None:
        """Validate, keep the adapter when it is the best yet, end the run when patience is over."""
        progress, patience = self._progress, self._config.patience
        metrics = self._validate()
        if progress.best_loss is None or metrics["loss"] < progress.best_loss:
            progress.best_loss, progress.best_epoch = metrics["loss"], progress.epoch
            progress.epochs_without_better = 0
            self._best = self._model.adapter_state()
        else:
            progress.epochs_without_better += 1
        progress.ended = patience is not None and progress.epochs_without_better >= patience
        self._emit(
            {
                "event": "validation",
                "step": progress.step,
                "epoch": progress.epoch,
                "best_epoch": progress.best_epoch,
                **metrics,
            }
        )

    def _guard_kl(self) -> None:
        if self._kl is not None:
            kl = self._kl.measure()
            self._progress.last["kl"] = kl
            check_kl(kl, self._config.max_kl, self._progress.step)

    def _compute_references(self) -> None:
        """Reference values of all that is compared with the base: cached, or computed now."""
        judged = (*self._training, *self._validation)
        compared = {
            "preference pairs": [one for one in judged if one.kind == "preference"],
            "labelled examples": [one for one in judged if one.kind == "labelled"],
            "mismatched answers": self._objective.mismatched,
        }
        cache = References(
            self._config.references_dir,
            base_revision=self._identity["base_revision"],
            template_hash=self._identity["template_hash"],
            dtype=self._model.dtype_name,
            compute=self._reference,
        )
        missing = {what: len(cache.missing(examples)) for what, examples in compared.items()}
        if any(missing.values()):
            counted = [f"{count} {what}" for what, count in missing.items() if count]
            self._emit(
                {
                    "event": "references",
                    "pairs": missing["preference pairs"],
                    "labelled": missing["labelled examples"],
                    "mismatched": missing["mismatched answers"],
                    "message": f"Computing what the base says about {_enumerate(counted)}.",
                }
            )
        for examples in compared.values():
            for example in examples:
                self._objective.references[example.content_hash] = cache.get(example)

    def _reference(self, example: RenderedExample) -> LogProbs:
        with self._model.base_only():
            found = self._model.sequence_logprobs(sequences_of(example))
            return tuple(values.cpu().numpy() for values in found)

    def _resume(self) -> list[str]:
        """Go back to the newest good checkpoint; sentences about the others."""
        checkpoint, refused = self._checkpoints.restore()
        if checkpoint is None:
            return refused
        self._progress = _Progress(step=checkpoint.step, **checkpoint.state)
        self._model.load_adapter(checkpoint.tensors["adapter"])
        self._best = dict(checkpoint.tensors.get("best", {}))
        moments = checkpoint.tensors["optimizer"]
        for key, value in moments.items():
            name, _, moment = key.rpartition(":")
            parameter = self._parameters[name]
            self._optimizer.state[parameter][moment] = value.to(parameter.device)
        _set_random_state(checkpoint.tensors["random"])
        return refused

    def _checkpoint(self) -> None:
        state = asdict(self._progress)
        step = state.pop("step")
        tensors: dict[str, Mapping[str, Tensor]] = {
            "adapter": self._model.adapter_state(),
            "optimizer": {
                f"{name}:{key}": value.cpu()
                for name, parameter in self._parameters.items()
                for key, value in self._optimizer.state[parameter].items()
            },
            "random": _random_state(),
        }
        if self._best:
            tensors["best"] = self._best
        self._checkpoints.save(Checkpoint(step, tensors, state))
        self._emit({"event": "checkpoint", "step": step})

    def _finish(self) -> None:
        """The best adapter with its figures."""
        config, progress = self._config, self._progress
        if self._best:
            self._model.load_adapter(self._best)
        metrics: dict[str, Any] = dict(progress.last)
        if self._best:
            metrics["validation_loss"] = progress.best_loss
        if self._kl is not None:
            metrics["kl"] = self._kl.measure()
        folder = config.output_dir / ADAPTER_FOLDER
        self._model.save_adapter(folder)
        self._emit(
            {
                "event": "finished",
                "adapter": str(folder),
                "probe": build_probe(self._model, self._renderer, self._training),
                "metrics": metrics,
                "manifest": self._manifest(),
                "message": self._describe_end(),
            }
        )

    def _describe_end(self) -> str:
        progress = self._progress
        said = f"Trained {progress.step} steps in {progress.epoch} epochs."
        if progress.best_epoch is not None and progress.best_epoch < progress.epoch:
            said += (
                f" Validation was best after epoch {progress.best_epoch}, so that adapter is kept."
            )
        return said

    def _manifest(self) -> dict[str, Any]:
        config, progress = self._config, self._progress
        return {
            **self._identity,
            "base_name": config.base_name,
            "data_hash": config.data_hash,
            "seeds": {"training": config.seed},
            "threads": config.threads,
            "dtype": self._model.dtype_name,
            "device": self._model.device.type,
            "examples": len(self._training),
            "kinds": dict(Counter(sorted(example.kind for example in self._training))),
            "validation_examples": len(self._validation),
            "dropped": dict(self._drops),
            "validation_dropped": dict(self._validation_drops),
            "steps": progress.step,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "target_modules": list(self._model.target_modules),
        }

    def _tell_start(self, refused: Sequence[str]) -> None:
        count = len(self._training)
        said = f"Training on {count} examples for {self._steps} steps"
        if self._config.validation_file is not None:
            said += f", {len(self._validation)} of the validation file beside them"
            said += _count_drops(self._validation_drops, "of it")
            said += _count_drops(self._drops, "of the training rows")
        else:
            if self._validation:
                said += f", {len(self._validation)} held back for validation"
            said += _count_drops(self._drops)
        event: dict[str, Any] = {
            "event": "started",
            "examples": count,
            "validation_examples": len(self._validation),
            "steps": self._steps,
            "epochs": self._config.epochs,
            "dropped": dict(self._drops),
            "validation_dropped": dict(self._validation_drops),
            "tokens": sum(example.tokens for example in self._training),
        }
        sentences = [f"{said}.", *refused]
        if self._progress.step:
            event["resumed_at_step"] = self._progress.step
            sentences.append(f"Resumed after step {self._progress.step}.")
        self._emit({**event, "message": " ".join(sentences)})

    def _tell_step(self, rate: float, tokens: int, started: float) -> None:
        """A step's metrics; not more often than people can read, the last of an epoch always."""
        progress, now = self._progress, time.monotonic()
        ends_epoch = progress.step % self._steps_per_epoch == 0
        if now - self._told < _SECONDS_BETWEEN_EVENTS and not ends_epoch:
            return
        self._told = now
        self._emit(
            {
                "event": "step",
                "step": progress.step,
                "steps": self._steps,
                "epoch": progress.epoch + 1,
                "learning_rate": rate,
                "tokens_per_second": tokens / max(now - started, 1e-9),
                **progress.last,
            }
        )


def _enumerate(parts: Sequence[str]) -> str:
    """As in "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _count_drops(drops: Mapping[str, int], whose: str | None = None) -> str:
    """The end of a sentence on how many were dropped and why; empty where none was."""
    if not drops:
        return ""
    reasons = ", ".join(f"{number} {reason}" for reason, number in drops.items())
    among = f" {whose}" if whose else ""
    return f", {sum(drops.values())}{among} dropped ({reasons})"


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, value in enumerate(torch.cuda.get_rng_state_all()):
            state[f"cuda:{index}"] = value
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)
