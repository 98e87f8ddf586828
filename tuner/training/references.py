"""Reference values: the base's own log-probabilities of each completion token, computed once.

Owns: their cache on disk, one small file an example, named by all that the values depend on. Each
example is computed alone, so neither its neighbours nor an interrupted run change its values. Does
not own: what they are compared with (`losses.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tuner.training.rendering import RenderedExample

LogProbs = tuple[NDArray[np.float32], ...]
"""Log-probability of each completion token in nats; one array a completion."""

_DIGEST = "sha256"


class References:
    """Reference values of one base under one chat template and dtype, cached in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        base_revision: str,
        template_hash: str,
        dtype: str,
        compute: Callable[[RenderedExample], LogProbs],
    ) -> None:
        key = json.dumps([base_revision, template_hash, dtype])
        self._folder = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._compute = compute

    def get(self, example: RenderedExample) -> LogProbs:
        """The example's reference values, from the cache or computed and put there."""
        file = self._file(example)
        found = _read(file, example)
        if found is None:
            found = self._compute(example)
            _write(file, found)
        return found

    def missing(self, examples: Sequence[RenderedExample]) -> list[RenderedExample]:
        """Those whose values are still to be computed."""
        return [example for example in examples if not self._file(example).is_file()]

    def _file(self, example: RenderedExample) -> Path:
        name = example.content_hash
        return self._folder / name[:2] / f"{name}.safetensors"


def _read(file: Path, example: RenderedExample) -> LogProbs | None:
    """What the file holds; None where it is missing or damaged, so that it is written anew."""
    try:
        with safe_open(file, framework="numpy") as stored:
            digest = (stored.metadata() or {}).get(_DIGEST)
            names = [str(index) for index in range(len(example.completions))]
            values = tuple(stored.get_tensor(name) for name in names)
    except (OSError, SafetensorError):
        return None
    lengths = [len(completion) for completion in example.completions]
    if digest != _digest(values) or [len(value) for value in values] != lengths:
        return None
    return values


def _write(file: Path, values: LogProbs) -> None:
    content = save(
        {str(index): value for index, value in enumerate(values)},
        metadata={_DIGEST: _digest(values)},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole: jobs may share the cache, and any may be killed.
    incoming = file.with_name(f".{file.name}.{os.getpid()}")
    incoming.write_bytes(content)
    incoming.replace(file)


def _digest(values: LogProbs) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.astype("<f4").tobytes())
    return digest.hexdigest()
