"""The base model with a LoRA adapter: loading it, log-probabilities, and the adapter's files.

Owns: how the model is called (logits at completion tokens only, the tree layout where attention
allows it), the adapter's weights in and out. Does not own: losses, optimisation, data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner.adapters import CONFIG_FILE, WEIGHTS_FILE, build_adapter_config
from tuner.base_models import BaseModelError, read_end_token_ids
from tuner.training.checkpoint import write_folder
from tuner.training.config import ConfigError, TrainingConfig
from tuner.training.layout import Layout, Sequence_, tree_layout

logger = logging.getLogger(__name__)

# Largest difference, in nats, between a tree and separate sequences that rounding explains.
_LAYOUT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5}


class TunedModel:
    """A frozen base with a trainable adapter."""

    def __init__(self, config: TrainingConfig, tokenizer: Any = None) -> None:
        """Load the base of `config` and put a new adapter into it (or `warm_start`'s).

        `tokenizer` is the base's own, where it was loaded before. Raises `ConfigError` where the
        base has none of the modules, or the warm start doesn't fit.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype_name = config.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.dtype: torch.dtype = getattr(torch, self.dtype_name)
        self._config = config
        self.tokenizer = load_tokenizer(config.base_path) if tokenizer is None else tokenizer
        base = _load_base(config.base_path, self.dtype)
        base.to(self.device)
        self.vocab_size: int = base.get_output_embeddings().weight.shape[0]
        self.end_token_ids = get_end_token_ids(config.base_path, self.tokenizer)
        torch.manual_seed(config.seed)
        self.target_modules = _target_modules(base, config.target_modules)
        self._peft = _add_adapter(base, config, self.target_modules)
        self._model = self._peft.get_base_model()
        self._peft.eval()
        self._dropouts = [
            module
            for name, module in self._peft.named_modules()
            if name.endswith("lora_dropout.default")
        ]
        self._set_dropout(True)
        if config.warm_start is not None:
            self.load_adapter(_read_warm_start(config.warm_start, config))
        self.uses_tree = _reaches_back_whole(base, config.max_length) and self._tree_is_exact()
        if not self.uses_tree:
            logger.info("Attention is not plainly causal: one pass a sequence")

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by their name in its files, sorted."""
        return {
            name.replace(".default.weight", ".weight"): value
            for name, value in sorted(self._peft.named_parameters())
            if value.requires_grad
        }

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within, the model answers as the base does, and nothing is recorded for gradients."""
        with self._peft.disable_adapter(), torch.inference_mode():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the model answers as it will be served, and nothing is recorded for gradients."""
        self._set_dropout(False)
        try:
            with torch.inference_mode():
                yield
        finally:
            self._set_dropout(True)

    def _set_dropout(self, on: bool) -> None:
        for module in self._dropouts:
            module.train(on)

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of the adapter's weights on the CPU, float32, named as in its files."""
        return {
            name: value.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, value in self.parameters.items()
        }

    def load_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Put weights of `adapter_state` into the model. Raises `ConfigError` unless they fit."""
        parameters = self.parameters
        if odd := sorted(parameters.keys() ^ state.keys()):
            raise ConfigError(
                f"the adapter's modules are not those to train: {odd[0]!r} is on one side only"
            )
        with torch.no_grad():
            for name, value in parameters.items():
                if value.shape != state[name].shape:
                    raise ConfigError(
                        f"{name!r} has shape {tuple(state[name].shape)}, "
                        f"expected {tuple(value.shape)}"
                    )
                value.copy_(state[name])

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter's two files; equal weights give equal bytes."""
        config = self._config
        described = build_adapter_config(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=self.target_modules,
            base_name=config.base_name,
            base_revision=config.base_revision,
        )
        weights = save(self.adapter_state(), metadata={"format": "pt"})
        write_folder(folder, {CONFIG_FILE: described, WEIGHTS_FILE: weights})

    def layouts(self, sequences: Sequence[Sequence_]) -> list[Layout]:
        """Lay out the sequences for forward passes.

        One tree for all of them, or one pass each where attention isn't plainly causal.
        """
        if self.uses_tree:
            return [tree_layout(sequences)]
        return [tree_layout([sequence]) for sequence in sequences]

    def sequence_logprobs(self, sequences: Sequence[Sequence_]) -> list[Tensor]:
        """Log-probability of each completion token given what precedes it.

        One `(length,)` float32 per sequence.
        """
        return [part for layout in self.layouts(sequences) for part in self.layout_logprobs(layout)]

    def layout_logprobs(self, layout: Layout) -> tuple[Tensor, ...]:
        """Log-probabilities of the completion tokens of one forward pass, by sequence."""
        logprobs = _pick(
            self.logits(layout), layout.rows.to(self.device), layout.targets.to(self.device)
        )
        return torch.split(logprobs, list(layout.lengths))

    def logits(self, layout: Layout) -> Tensor:
        """Logits at the layout's `predictors`, `(m, vocabulary)`, float32."""
        output = self._model(
            input_ids=layout.tokens.to(self.device),
            position_ids=layout.positions.to(self.device),
            attention_mask=self._additive(layout.mask),
            logits_to_keep=layout.predictors.to(self.device),
            use_cache=False,
        )
        logits: Tensor = output.logits[0]
        return logits.float()

    def _additive(self, mask: Tensor | None) -> Tensor | None:
        """The mask as an additive one, for attention scores.

        Converted once here instead of once per layer.
        """
        if mask is None:
            return None
        blocked = torch.zeros(mask.shape, dtype=self.dtype).masked_fill_(
            ~mask, torch.finfo(self.dtype).min
        )
        return blocked.to(self.device)

    def _tree_is_exact(self) -> bool:
        """True when sequences in one tree get the values that they get alone, up to rounding.

        Tried on the loaded model, because what its layers look at is not written anywhere:
        convolutions, recurrences and position tables all differ here.
        """
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab_size, (64,), generator=random).tolist()
        shared, rest = tuple(tokens[:16]), tokens[16:]
        sequences: list[Sequence_] = [
            (shared, tuple(rest[:16])),
            (shared, tuple(rest[16:32])),
            ((*shared[:8], *rest[32:40]), tuple(rest[40:])),
        ]
        tolerance = _LAYOUT_TOLERANCE[self.dtype]
        with self.base_only():
            together = self.layout_logprobs(tree_layout(sequences))
            for sequence, found in zip(sequences, together, strict=True):
                (expected,) = self.layout_logprobs(tree_layout([sequence]))
                if not bool((found - expected).abs().max() <= tolerance):
                    return False
        return True


class _Pick(torch.autograd.Function):
    """`log softmax(logits)[rows, targets]`, with one buffer of the logits' size instead of three.

    The vocabulary makes the logits by far the largest tensor of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        normalisers = logits.logsumexp(dim=-1)
        ctx.save_for_backward(logits, normalisers, rows, targets)
        return logits[rows, targets] - normalisers[rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        logits, normalisers, rows, targets = ctx.saved_tensors
        by_row = torch.zeros_like(normalisers).index_add_(0, rows, gradient)
        result = (logits - normalisers[:, None]).exp_().mul_(-by_row[:, None])
        result.index_put_((rows, targets), gradient, accumulate=True)
        return result, None, None


def _pick(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    picked: Tensor = _Pick.apply(logits, rows, targets)  # type: ignore[no-untyped-call]
    return picked


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the directory `path`, without the model. Raises `ConfigError`."""
    if not path.is_dir():
        raise ConfigError(f"base_path: there is no directory {str(path)!r}")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from None


def get_end_token_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens at which an engine ends an answer. Raises `ConfigError` where there is none."""
    try:
        found = read_end_token_ids(path, tokenizer.eos_token_id)
    except BaseModelError as error:
        raise _no_model(path, error) from None
    if not found:
        raise ConfigError(
            "the base has no end-of-turn token: neither generation_config.json nor the tokenizer "
            "names one as eos_token"
        )
    return found


def _load_base(path: Path, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise _no_model(path, error) from None


def _no_model(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"base_path: {str(path)!r} holds no model to load ({error})")


def _target_modules(base: Any, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Last parts of the names of the modules to adapt, sorted: all linear layers but the output."""
    output = base.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    if missing := sorted(set(asked or ()) - found):
        raise ConfigError(f"target_modules: the base has no {missing!r}; it has {sorted(found)!r}")
    if not found:
        raise ConfigError("the base has no linear layers that could carry an adapter")
    return tuple(sorted(set(asked or found)))


def _add_adapter(base: Any, config: TrainingConfig, target_modules: Sequence[str]) -> Any:
    """The base, frozen, with a new adapter; the global random state alone decides its weights."""
    return get_peft_model(
        base,
        LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # any number scales
            lora_dropout=config.lora_dropout,
            target_modules=list(target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )


def _read_warm_start(folder: Path, config: TrainingConfig) -> dict[str, Tensor]:
    try:
        described = json.loads((folder / CONFIG_FILE).read_bytes())
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"warm_start: {str(folder)!r} holds no adapter ({error})") from None
    for name in ("r", "lora_alpha"):
        if described.get(name) != getattr(config, name):
            raise ConfigError(
                f"warm_start: its {name} is {described.get(name)!r}, "
                f"this job's is {getattr(config, name)!r}"
            )
    return state


def _reaches_back_whole(base: Any, max_length: int) -> bool:
    """False where a layer looks back less far than examples may be long.

    A mask of ours would take the place of the layer's own.
    """
    config = base.config.get_text_config()
    if getattr(config, "use_sliding_window", True):
        windows = [getattr(config, "sliding_window", None)]
    else:
        windows = []
    windows.append(getattr(config, "attention_chunk_size", None))
    return all(window is None or window >= max_length for window in windows)
