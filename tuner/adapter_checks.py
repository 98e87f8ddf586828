"""What is checked of an adapter's two files before it is stored, loaded or promoted.

Owns: every reason for which an adapter is refused that its files can show; nothing in them is
executed. Does not own: their form and the store (`adapters.py`), or whether an engine applies them.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, deserialize

from tuner.adapters import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    AdapterFacts,
    AdapterRefused,
    content_hash,
)

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy"})
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Options that say nothing about the weights; peft writes some of them even when unused.
_INERT_KEYS = frozenset(
    {"peft_version", "auto_mapping", "megatron_core", "qalora_group_size", "inference_mode"}
)
_READ_KEYS = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha",
     "lora_dropout", "target_modules", "bias", "lora_bias", "modules_to_save", "use_dora",
     "init_lora_weights"}
)  # fmt: skip
# Initialisations that only choose where training starts; PiSSA, OLoRA, LoftQ, CorDA change the
# base's own weights.
_PLAIN_INITS = (True, False, None, "gaussian")
# safetensors dtype -> (numpy view, mask of the exponent bits, mask of everything but the sign)
_FLOATS: Final[Mapping[str, tuple[str, int, int]]] = {
    "float32": ("<u4", 0x7F80_0000, 0x7FFF_FFFF),
    "float16": ("<u2", 0x7C00, 0x7FFF),
    "bfloat16": ("<u2", 0x7F80, 0x7FFF),
}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_adapter(
    folder: Path,
    *,
    base_name: str,
    base_revision: str | None,
    max_rank: int,
    target_modules: frozenset[str] | set[str] | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    max_bytes: int = 2 * 1024**3,
) -> AdapterFacts:
    """Check everything about an adapter that its two files can show; nothing in them is executed.

    `target_modules`: module names that may be adapted (last part, `q_proj`); None allows all.
    `shapes`: the base's linear layers, full module name to `(out_features, in_features)`; None
    skips that comparison.

    Raises `AdapterRefused`: `symlink`, `pickle`, `extra_file`, `missing_file`, `oversized`,
    `bad_config`, `wrong_base`, `modules_to_save`, `dora`, `bias`, `init`, `unsupported`,
    `wrong_rank`, `wrong_modules`, `wrong_shape`, `truncated`, `wrong_dtype`, `not_finite`,
    `all_zero`.
    """
    size_bytes = _check_files(folder, max_bytes)
    config = _read_config(folder / CONFIG_FILE)
    _check_base(config, base_name, base_revision)
    _check_options(config)
    rank = _check_rank(config, max_rank)
    names = _check_target_modules(config, target_modules)
    parameters, dtype = _check_weights(folder / WEIGHTS_FILE, rank, names, shapes)
    return AdapterFacts(
        content_hash=content_hash(folder),
        r=rank,
        lora_alpha=float(config["lora_alpha"]),
        target_modules=names,
        parameters=parameters,
        size_bytes=size_bytes,
        dtype=dtype,
    )


def _check_files(folder: Path, max_bytes: int) -> int:
    """Exactly the two regular files lie in `folder`; return their size in bytes."""
    if folder.is_symlink():
        raise AdapterRefused(
            "symlink", f"{folder.name!r} is a symbolic link; an adapter is a folder of two files"
        )
    if not folder.is_dir():
        raise AdapterRefused("missing_file", f"{folder.name!r} is not a folder")
    sizes: dict[str, int] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            raise AdapterRefused(
                "symlink", f"{entry.name!r} is a symbolic link; only plain files are taken"
            )
        if Path(entry.name).suffix.lower() in _PICKLE_SUFFIXES:
            raise AdapterRefused(
                "pickle", f"{entry.name!r} may hold a pickle; weights come as {WEIGHTS_FILE!r}"
            )
        if entry.name not in (CONFIG_FILE, WEIGHTS_FILE) or not stat.S_ISREG(mode):
            raise AdapterRefused(
                "extra_file",
                f"found {entry.name!r}; only {CONFIG_FILE!r} and {WEIGHTS_FILE!r} belong there",
            )
        sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in sizes:
            raise AdapterRefused("missing_file", f"{name!r} is missing")
    total = sum(sizes.values())
    if sizes[CONFIG_FILE] > MAX_CONFIG_BYTES:
        raise AdapterRefused(
            "oversized",
            f"{CONFIG_FILE!r} holds {sizes[CONFIG_FILE]} bytes; at most {MAX_CONFIG_BYTES} "
            "are taken",
        )
    if total > max_bytes:
        raise AdapterRefused(
            "oversized", f"the files hold {total} bytes; at most {max_bytes} are taken"
        )
    return total


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterRefused("bad_config", f"{CONFIG_FILE!r} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterRefused(
            "bad_config", f"{CONFIG_FILE!r} holds {type(config).__name__}, expected an object"
        )
    return config


def _check_base(config: Mapping[str, Any], base_name: str, base_revision: str | None) -> None:
    found = (config.get("base_model_name_or_path"), config.get("revision"))
    if found != (base_name, base_revision):
        raise AdapterRefused(
            "wrong_base",
            f"the adapter was trained on {found[0]!r} revision {found[1]!r}, "
            f"the base here is {base_name!r} revision {base_revision!r}",
        )


def _check_options(config: Mapping[str, Any]) -> None:
    """Plain LoRA only: whatever else is switched on, an engine would refuse or, worse, ignore."""
    if config.get("peft_type") != "LORA" or config.get("task_type") not in (None, "CAUSAL_LM"):
        kind = (config.get("peft_type"), config.get("task_type"))
        raise AdapterRefused(
            "unsupported", f"found {kind!r}; only LoRA of a causal language model is served"
        )
    if config.get("modules_to_save"):
        raise AdapterRefused(
            "modules_to_save", f"modules_to_save is {config['modules_to_save']!r}; expected null"
        )
    if config.get("use_dora"):
        raise AdapterRefused("dora", "use_dora is on; engines serve plain LoRA only")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise AdapterRefused(
            "bias", "the adapter trains biases; expected bias 'none' and lora_bias false"
        )
    init = config.get("init_lora_weights", True)
    if not any(init is plain or init == plain for plain in _PLAIN_INITS):
        raise AdapterRefused(
            "init",
            f"init_lora_weights is {init!r}, which changes the base's own weights; "
            "convert it to plain LoRA",
        )
    for key in sorted(config.keys() - _READ_KEYS - _INERT_KEYS):
        if config[key]:
            raise AdapterRefused(
                "unsupported", f"option {key!r} is {config[key]!r}; engines serve plain LoRA only"
            )


def _check_rank(config: Mapping[str, Any], max_rank: int) -> int:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise AdapterRefused(
            "wrong_rank", f"r is {rank!r}; expected a whole number from 1 to {max_rank}"
        )
    if rank > max_rank:
        raise AdapterRefused(
            "wrong_rank", f"rank {rank} is above {max_rank}, the largest that the engines take"
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise AdapterRefused("bad_config", f"lora_alpha is {alpha!r}; expected a positive number")
    return rank


def _check_target_modules(
    config: Mapping[str, Any], allowed: frozenset[str] | set[str] | None
) -> tuple[str, ...]:
    names = config.get("target_modules")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise AdapterRefused(
            "wrong_modules", f"target_modules is {names!r}; expected a list of module names"
        )
    if allowed is not None and (unknown := sorted(set(names) - allowed)):
        raise AdapterRefused(
            "wrong_modules",
            f"the base has no linear layers {unknown!r}; it has {sorted(allowed)!r}",
        )
    return tuple(sorted(set(names)))


def _check_weights(
    path: Path, rank: int, names: tuple[str, ...], shapes: Mapping[str, tuple[int, int]] | None
) -> tuple[int, str]:
    """Every tensor is half of a finite `(A, B)` pair; return parameter count and dtype."""
    try:
        # The package marks itself as typed and leaves this function without annotations.
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(  # type: ignore[no-untyped-call]
            path.read_bytes()
        )
    except SafetensorError as error:
        raise AdapterRefused(
            "truncated", f"{WEIGHTS_FILE!r} is incomplete or not safetensors: {error}"
        ) from None
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    dtypes: set[str] = set()
    parameters, effective = 0, False
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterRefused(
                _odd_tensor_reason(name), f"tensor {name!r} is not part of a plain LoRA"
            )
        dtype = _DTYPE_NAMES.get(tensor["dtype"], tensor["dtype"])
        if dtype not in _FLOATS:
            raise AdapterRefused(
                "wrong_dtype", f"{name!r} is {dtype}; expected one of {sorted(_FLOATS)!r}"
            )
        # Bits instead of floats: numpy has no bfloat16, and this finds NaN, infinity and zero in
        # all three formats.
        view, exponent, magnitude = _FLOATS[dtype]
        bits = np.frombuffer(tensor["data"], dtype=view)
        if bool(np.any((bits & exponent) == exponent)):
            raise AdapterRefused("not_finite", f"{name!r} holds NaN or infinity")
        if match["side"] == "B" and bool(np.any(bits & magnitude)):
            effective = True
        sides.setdefault(match["module"], {})[match["side"]] = tuple(tensor["shape"])
        dtypes.add(dtype)
        parameters += bits.size
    _check_pairs(sides, rank, names, shapes)
    if not effective:
        raise AdapterRefused(
            "all_zero", "every B matrix is zero, so the adapter would change nothing"
        )
    if len(dtypes) != 1:
        raise AdapterRefused(
            "wrong_dtype", f"the tensors mix {sorted(dtypes)!r}; expected one dtype"
        )
    return parameters, dtypes.pop()


def _odd_tensor_reason(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "dora"
    return "bias" if name.endswith(".bias") else "wrong_modules"


def _check_pairs(
    sides: Mapping[str, Mapping[str, tuple[int, ...]]],
    rank: int,
    names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, int]] | None,
) -> None:
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterRefused("wrong_modules", f"{module!r} has only its {''.join(pair)} matrix")
        a, b = pair["A"], pair["B"]
        if len(a) != 2 or len(b) != 2:
            raise AdapterRefused(
                "wrong_shape", f"{module!r} has shapes A {a}, B {b}; expected matrices"
            )
        if a[0] != rank or b[1] != rank:
            raise AdapterRefused(
                "wrong_rank", f"{module!r} has rank {a[0]} (A) and {b[1]} (B), r says {rank}"
            )
        if module.rpartition(".")[2] not in names:
            raise AdapterRefused(
                "wrong_modules", f"{module!r} is not among target_modules {list(names)!r}"
            )
        if shapes is not None and module not in shapes:
            raise AdapterRefused("wrong_modules", f"the base has no linear layer {module!r}")
        if shapes is not None and (b[0], a[1]) != tuple(shapes[module]):
            raise AdapterRefused(
                "wrong_shape", f"{module!r} is {(b[0], a[1])}, the base's is {shapes[module]}"
            )
    found = {module.rpartition(".")[2] for module in sides}
    if missing := sorted(set(names) - found):
        raise AdapterRefused(
            "wrong_modules", f"target_modules names {missing!r}, which have no tensors"
        )
