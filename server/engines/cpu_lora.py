"""LoRA on a CPU, right and fast: a plugin that vLLM loads in each of its processes.

vLLM 0.32 marks a token of the base with adapter index -1. Its CPU operators index a tensor with
that, so the base answers with the weights in the last slot whenever an adapter runs in the same
step (https://github.com/vllm-project/vllm/pull/48421). They also copy an adapter's matrices once
per token. The operators here skip such tokens, and multiply each run of tokens of one adapter by
its matrices where they are.

Owns: four operators, put in place of vLLM's by `install`, which the entry point
`vllm.general_plugins` in pyproject.toml names. Imports torch and vLLM inside the engine alone; on a
GPU, whose operators are right, it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any

GROUP, NAME = "vllm.general_plugins", "burnish_cpu_lora"

Tensor = Any  #: torch's; this module must be importable where torch is not


def is_installed() -> bool:
    """Whether an engine that is started in this environment would find the plugin."""
    return bool(metadata.entry_points(group=GROUP, name=NAME))


def install() -> None:
    """Put the operators in place. May be called again; raises `AttributeError` on another vLLM."""
    if not import_module("vllm.platforms").current_platform.is_cpu():
        return
    punica = import_module("vllm.lora.punica_wrapper.punica_cpu")
    ours = {
        "sgmv_shrink": _sgmv_shrink,
        "sgmv_expand_slice": _sgmv_expand_slice,
        "bgmv_shrink": _bgmv_shrink,
        "bgmv_expand_slice": _bgmv_expand_slice,
    }
    for name, operator in ours.items():
        getattr(punica, name)  # vLLM has renamed it: don't start with operators that are wrong
        setattr(punica, name, operator)


def shrink(x: Tensor, lora_a: Tensor, output: Tensor, runs: Runs, scaling: float) -> None:
    """`output = scaling · x Aᵀ` with each run's own A; 0 for tokens of the base.

    x `(tokens, in)`, lora_a `(slots, 1, rank, in)` or without the 1, output `(tokens, rank)`.
    """
    for slot, start, stop in runs:
        if slot < 0:
            output[start:stop] = 0
        else:
            a = _matrix(lora_a, slot).to(output.dtype)
            output[start:stop, : a.shape[0]] = x[start:stop].to(output.dtype) @ a.T * scaling


def expand(
    x: Tensor, lora_b: Tensor, output: Tensor, runs: Runs, offset: int, size: int, *, add: bool
) -> None:
    """`output[:, offset:offset + size] += x Bᵀ` with each run's own B, nothing for the base.

    x `(tokens, rank)`, lora_b `(slots, 1, size, rank)` or without the 1. Without `add`: `=`.
    """
    columns = slice(offset, offset + size)
    for slot, start, stop in runs:
        if slot >= 0:
            product = x[start:stop].to(output.dtype) @ _matrix(lora_b, slot).to(output.dtype).T
            if add:
                output[start:stop, columns] += product
            else:
                output[start:stop, columns] = product
        elif not add:
            output[start:stop, columns] = 0


Runs = Iterator[tuple[int, int, int]]
"""Slot (-1: the base), first token, token after the last, of neighbours with one adapter."""


def runs_of(slots: Tensor, lengths: Tensor) -> Runs:
    """Runs out of vLLM's metadata: one slot and one number of tokens for each; `(runs,)` both."""
    start = 0
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        yield slot, start, start + length
        start += length


def _matrix(weights: Tensor, slot: int) -> Tensor:
    return weights[slot, 0] if weights.ndim == 4 else weights[slot]


def _runs_of_tokens(indices: Tensor) -> Runs:
    return runs_of(*indices.unique_consecutive(return_counts=True))


# vLLM's names and parameters: vllm/lora/ops/torch_ops/lora_ops.py. `sgmv` gets runs, `bgmv` the
# slot of each token.


def _sgmv_shrink(
    x: Tensor,
    lora_a: Tensor,
    output: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    batches: int,
    longest: int,
    tokens: int,
    scaling: float,
) -> None:
    shrink(x, lora_a, output, runs_of(slots, lengths), scaling)


def _bgmv_shrink(
    x: Tensor, lora_a: Tensor, output: Tensor, indices: Tensor, scaling: float = 1.0
) -> None:
    shrink(x, lora_a, output, _runs_of_tokens(indices), scaling)


def _sgmv_expand_slice(
    x: Tensor,
    lora_b: Tensor,
    output: Tensor,
    starts: Tensor,
    lengths: Tensor,
    slots: Tensor,
    batches: int,
    longest: int,
    tokens: int,
    offset: int,
    size: int,
    add_inputs: bool = False,
) -> None:
    expand(x, lora_b, output, runs_of(slots, lengths), offset, size, add=add_inputs)


def _bgmv_expand_slice(
    x: Tensor,
    lora_b: Tensor,
    output: Tensor,
    indices: Tensor,
    offset: int,
    size: int,
    add_inputs: bool = True,
) -> None:
    expand(x, lora_b, output, _runs_of_tokens(indices), offset, size, add=add_inputs)
