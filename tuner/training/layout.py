"""Lays out sequences for one forward pass as a tree, so that common prefixes are computed once.

Owns: the tree, its attention mask, and which positions predict which completion tokens. A
preference pair is `[prompt][chosen][rejected]` in one row; examples with the same system prompt
share it too. Each token attends to the tokens on its own path from the root and keeps the position
it has there, so every layer of plain causal attention gives the same values as it would for the
sequence alone (tree attention, as in SpecInfer, Miao et al. 2023, section 4). Does not own: the
model, or the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from tuner.training.rendering import RenderedExample

Sequence_ = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Layout:
    """One forward pass over `n` tokens, for the log-probabilities of `t` completion tokens."""

    tokens: Tensor  #: (1, n) int64
    positions: Tensor  #: (1, n) int64; distance from the root
    mask: Tensor | None  #: (1, 1, n, n) bool, true where a token may attend; None: plain causal
    predictors: Tensor  #: (m,) int64, ascending: the tokens whose logits are needed
    rows: Tensor  #: (t,) int64 into `predictors`: which of them predicts each completion token
    targets: Tensor  #: (t,) int64: the completion tokens, sequence after sequence
    lengths: tuple[int, ...]  #: completion tokens of each sequence; they add up to t


def tree_layout(sequences: Sequence[Sequence_]) -> Layout:
    """Lay (prompt, completion) pairs out as one row that holds each shared beginning once."""
    children: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    for prompt, completion in sequences:
        node = -1
        # The last token predicts nothing that is asked for, so it needs no place.
        for index, token in enumerate((*prompt, *completion[:-1])):
            parent, node = node, children.get((node, token), -1)
            if node < 0:
                node = children[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
                depths.append(index)
            if index >= len(prompt) - 1:
                predictors.append(node)
        targets.extend(completion)
    needed, rows = np.unique(np.array(predictors, dtype=np.int64), return_inverse=True)
    return Layout(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([depths]),
        mask=_ancestors(parents),
        predictors=torch.from_numpy(needed),
        rows=torch.from_numpy(rows),
        targets=torch.tensor(targets),
        lengths=tuple(len(completion) for _, completion in sequences),
    )


def _ancestors(parents: Sequence[int]) -> Tensor | None:
    """The attention mask of a tree: which tokens lie on each token's path from the root.

    None for a single path, which is plain causal order.
    """
    if all(parent == index - 1 for index, parent in enumerate(parents)):
        return None
    allowed = np.zeros((len(parents), len(parents)), dtype=np.bool_)
    for index, parent in enumerate(parents):
        if parent >= 0:
            allowed[index] = allowed[parent]
        allowed[index, index] = True
    return torch.from_numpy(allowed)[None, None]


def sequences_of(example: RenderedExample) -> list[Sequence_]:
    """Prompt and completion of each of the example's sequences."""
    return [(example.prompt, completion) for completion in example.completions]


def pack(examples: Sequence[RenderedExample], *, max_tokens: int) -> list[list[RenderedExample]]:
    """Group the examples of one step into forward passes of about `max_tokens`.

    Examples that begin alike are put together. An example is never divided, so one that is longer
    has a pass of its own. The order depends on the examples alone.
    """
    passes: list[list[RenderedExample]] = []
    room = 0
    for example in sorted(
        examples, key=lambda example: (example.prompt, example.completions, example.id)
    ):
        shared = _shared_tokens(passes[-1][-1], example) if passes else 0
        if not passes or example.tokens - shared > room:
            passes.append([])
            room, shared = max_tokens, 0
        passes[-1].append(example)
        room -= example.tokens - shared
    return passes


def _shared_tokens(left: RenderedExample, right: RenderedExample) -> int:
    pairs = zip(left.prompt, right.prompt, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
