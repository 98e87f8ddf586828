"""What is known about a base model from its files alone: identity, template, limits, shapes.

Owns: the revision of a local directory (a hash of its content), the hash of a chat template, and
the reading of safetensors headers. Imports no torch and loads no weights. Does not own: making a
model's directory (`training/convert.py`) or which base a deployment uses.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = (
    "burnish-model.json"  #: last file written into a directory that we make: name, revision, source
)

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # safetensors' own limit
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out")


class BaseModelError(ValueError):
    """The directory holds no model to serve and tune; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """One base model on this machine's disk."""

    name: str
    path: Path
    revision: str
    template_hash: str  #: sha256 of the chat template's text, hex
    architecture: str  #: `model_type` of its configuration, as in `llama`
    max_position_embeddings: int  #: longest context in tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    linear_modules: Mapping[str, tuple[int, int]]
    """Module name to `(out_features, in_features)` of each linear layer that can carry an adapter.

    Without embeddings and output head. Empty where the weights are quantised or not in safetensors.
    """


def describe_base(
    path: Path, name: str, revision: str | None = None, *, cache: Path | None = None
) -> BaseModel:
    """Describe the model in the directory `path`.

    `revision` is the hub's where one is known; else what the directory's own mark says, else a hash
    of its content, kept in the file `cache` for as long as no file changes its size or time. Raises
    `BaseModelError`.
    """
    if not path.is_dir():
        raise BaseModelError(
            f"no model at {str(path)!r}: expected a directory with config.json and weights"
        )
    config = _read_json(path / "config.json")
    text_config = config.get("text_config") or config
    generation = (
        _read_json(path / "generation_config.json")
        if (path / "generation_config.json").is_file()
        else {}
    )
    eos = generation.get("eos_token_id", text_config.get("eos_token_id"))
    try:
        return BaseModel(
            name=name,
            path=path,
            revision=revision or _marked_revision(path) or content_revision(path, cache=cache),
            template_hash=template_hash(read_chat_template(path)),
            architecture=str(text_config["model_type"]),
            max_position_embeddings=int(text_config["max_position_embeddings"]),
            vocab_size=int(text_config["vocab_size"]),
            eos_token_ids=()
            if eos is None
            else tuple(eos)
            if isinstance(eos, list)
            else (int(eos),),
            linear_modules=dict(_linear_modules(path)),
        )
    except KeyError as missing:
        raise BaseModelError(
            f"{path / 'config.json'} lacks {missing}: not a causal language model?"
        ) from None


def template_hash(template: str) -> str:
    """Identity of a chat template: sha256 of its text, hex."""
    return hashlib.sha256(template.encode()).hexdigest()


def read_chat_template(path: Path) -> str:
    """The chat template that tokenizers load from `path`. Raises `BaseModelError` without one."""
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for file in (path / "chat_template.json", path / "tokenizer_config.json"):
        template = _read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # several by name, as some tool-using models have
            template = next(
                (entry["template"] for entry in template if entry["name"] == "default"), None
            )
        if isinstance(template, str):
            return template
    raise BaseModelError(
        f"{str(path)!r} has no chat template; give the directory of a chat or instruct model"
    )


def content_revision(path: Path, *, cache: Path | None = None) -> str:
    """`sha256-` + hex over weights, configuration and tokenizer of the directory `path`.

    Versions of libraries, which saving writes into the configuration, don't count. About a second
    per GB.
    """
    files = sorted(path.glob("*.safetensors")) + [
        file
        for name in ("config.json", "tokenizer.json", "tokenizer.model")
        if (file := path / name).is_file()
    ]
    if not any(file.suffix == ".safetensors" for file in files):
        raise BaseModelError(f"{str(path)!r} has no *.safetensors weights")
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = str(path.resolve())
    known = _read_cache(cache)
    if (entry := known.get(key)) is not None and entry["stamp"] == stamp:
        return str(entry["revision"])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{_file_digest(file)}\n".encode())
    revision = f"sha256-{digest.hexdigest()}"
    if cache is not None:
        known[key] = {"stamp": stamp, "revision": revision}
        _write_json(cache, known)
    return revision


def _file_digest(file: Path) -> str:
    if file.name == "config.json":
        config = {
            key: value for key, value in _read_json(file).items() if key != "transformers_version"
        }
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _marked_revision(path: Path) -> str | None:
    return str(_read_json(path / MARK)["revision"]) if (path / MARK).is_file() else None


def _linear_modules(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Two-dimensional `….weight` tensors inside the layers, from the files' headers."""
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in _safetensors_header(file).items():
            module, _, parameter = name.rpartition(".")
            if (
                parameter != "weight"
                or len(tensor["shape"]) != 2
                or tensor["dtype"] not in ("F32", "F16", "BF16")
            ):
                continue
            if module.rpartition(".")[2] not in _EMBEDDINGS:
                yield module, (tensor["shape"][0], tensor["shape"][1])


def _safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor names with `dtype` and `shape`, as at
    https://github.com/huggingface/safetensors#format.
    """
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise BaseModelError(f"{str(file)!r} is no safetensors file (header of {length} bytes)")
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        except ValueError as error:
            raise BaseModelError(f"{str(file)!r} is no safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(
            f"{str(file)!r} is missing: the directory holds no complete model"
        ) from None
    except ValueError as error:
        raise BaseModelError(f"{str(file)!r} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise BaseModelError(f"{str(file)!r} must hold a JSON object")
    return content


def _read_cache(cache: Path | None) -> dict[str, Any]:
    """What was hashed before; a cache that can't be read is made anew."""
    try:
        return _read_json(cache) if cache is not None else {}
    except BaseModelError:
        return {}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
