"""What is known about a base model from its files alone: identity, template, limits, shapes.

Owns: the revision of a local directory (a hash of its content), its chat templates and tokens, what
of it could be read in two ways, and the reading of safetensors headers. Imports no torch and loads
no weights. Does not own: making a model's directory (`training/convert.py`) or which base a
deployment uses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tuner.chat_template import ChatTemplate
from tuner.control_tokens import ControlTokens

MARK = (
    "burnish-model.json"  #: last file written into a directory that we make: name, revision, source
)

_MAX_HEADER_BYTES = 100 * 1024 * 1024  # safetensors' own limit
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out")


NAMED_TOKENS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

#: What decides how a prompt is rendered and read as tokens.
_PROMPT_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
_INDEX: Final = "model.safetensors.index.json"


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
    chat_template: ChatTemplate
    control_tokens: ControlTokens  #: what people's text must not become


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
    check_one_model(path)
    template = template_hash(read_chat_template(path))
    _check_mark(path, template)
    try:
        return BaseModel(
            name=name,
            path=path,
            revision=revision or _marked_revision(path) or content_revision(path, cache=cache),
            template_hash=template,
            chat_template=read_template(path),
            control_tokens=read_control_tokens(path),
            architecture=str(text_config["model_type"]),
            max_position_embeddings=int(text_config["max_position_embeddings"]),
            vocab_size=int(text_config["vocab_size"]),
            eos_token_ids=read_end_token_ids(path, _find_end_token_id(path)),
            linear_modules=dict(_linear_modules(path)),
        )
    except KeyError as missing:
        raise BaseModelError(
            f"{path / 'config.json'} lacks {missing}: not a causal language model?"
        ) from None


def read_end_token_ids(path: Path, tokenizer_end: int | None) -> tuple[int, ...]:
    """The tokens at which an engine ends an answer: those declared, then the tokenizer's own.

    vLLM takes them from generation_config.json, and from config.json only where there is no such
    file. Raises `BaseModelError`.
    """
    if (path / "generation_config.json").is_file():
        declared = _read_json(path / "generation_config.json").get("eos_token_id")
    else:
        config = _read_json(path / "config.json")
        declared = config.get("eos_token_id")
        if declared is None:
            declared = (config.get("text_config") or {}).get("eos_token_id")
    ends = [*(declared if isinstance(declared, list) else [declared]), tokenizer_end]
    return tuple(dict.fromkeys(int(token) for token in ends if token is not None))


def template_hash(template: str) -> str:
    """Identity of a chat template: sha256 of its text, hex."""
    return hashlib.sha256(template.encode()).hexdigest()


def read_chat_template(path: Path) -> str:
    """The chat template that tokenizers load from `path`. Raises `BaseModelError` without one."""
    return read_chat_templates(path)[0]


def read_chat_templates(path: Path) -> tuple[str, str | None]:
    """The chat template in `path`, and the one for requests with tools where it has its own.

    Raises `BaseModelError` without one.
    """
    named: dict[str, Any] = {}
    for file in (path / "tokenizer_config.json", path / "chat_template.json"):
        found = _read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):  # several by name, as some tool-using models have
            named |= {entry["name"]: entry["template"] for entry in found}
        elif found is not None:
            named = {"default": found}
    if (file := path / "chat_template.jinja").is_file():
        named = {"default": file.read_text(encoding="utf-8")}
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = file.read_text(encoding="utf-8")
    if not isinstance(named.get("default"), str):
        raise BaseModelError(
            f"{str(path)!r} has no chat template; set model.path to a chat or instruct model, or "
            "put the base's template there as chat_template.jinja"
        )
    return named["default"], named.get("tool_use")


def read_special_tokens(path: Path) -> dict[str, str]:
    """The named tokens of the tokenizer in `path`, as `bos_token`, each with its text."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        given = _read_json(path / name) if (path / name).is_file() else {}
        for key in (f"{token}_token" for token in NAMED_TOKENS):
            text = _token_text(given.get(key))
            if text is not None:
                found[key] = text
    return found


def read_template(path: Path) -> ChatTemplate:
    """The chat template of the base in the directory `path`. Raises `BaseModelError`."""
    text, tools_text = read_chat_templates(path)
    return ChatTemplate(text, tools_text, read_special_tokens(path))


def read_control_tokens(path: Path) -> ControlTokens:
    """Those of the tokenizer and the templates in `path`."""
    special, other = set(read_special_tokens(path).values()), set[str]()
    config = _read_json(file) if (file := path / "tokenizer_config.json").is_file() else {}
    added = [*(config.get("added_tokens_decoder") or {}).values(), *_added_tokens(path)]
    for token in added:
        (special if token.get("special") else other).add(str(token.get("content")))
    further = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    for tokens in further:
        listed = tokens.values() if isinstance(tokens, dict) else tokens or ()
        special |= {text for token in listed if (text := _token_text(token)) is not None}
    templates = (template for template in read_chat_templates(path) if template is not None)
    return ControlTokens.of(special, other - special, templates)


def _find_end_token_id(path: Path) -> int | None:
    """The id of the tokenizer's `eos_token`; None where the files don't say."""
    text = read_special_tokens(path).get("eos_token")
    ids = (token.get("id") for token in _added_tokens(path) if token.get("content") == text)
    return next((id_ for id_ in ids if isinstance(id_, int)), None) if text is not None else None


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    """`added_tokens` of `tokenizer.json`; the file has megabytes of vocabulary behind them."""
    if not (file := path / "tokenizer.json").is_file():
        return []
    text = file.read_text(encoding="utf-8")
    found = re.search(r'"added_tokens"\s*:\s*', text)
    if found is None:
        return []
    try:
        tokens, _ = json.JSONDecoder().raw_decode(text, found.end())
    except ValueError as error:
        raise BaseModelError(f"{str(file)!r} is no JSON: {error}") from None
    return [token for token in tokens or () if isinstance(token, dict)]


def _token_text(token: Any) -> str | None:
    """A token's text: a string, or an object that has it as `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def check_one_model(path: Path) -> None:
    """Raise `BaseModelError` where engine and trainer may read different models out of `path`.

    An engine takes every safetensors file that no index lists, and other formats' files where it
    finds them; the trainer takes `model.safetensors` or what the index lists.
    """
    if (path / _INDEX).is_file():
        listed = set((_read_json(path / _INDEX).get("weight_map") or {}).values())
    else:
        listed = {"model.safetensors"}
    found = {file.name for file in path.glob("*.safetensors")}
    if missing := sorted(listed - found) if (path / _INDEX).is_file() else []:
        raise BaseModelError(
            f"{str(path)!r} lacks {missing[0]}, which {_INDEX} lists: fetch the model again"
        )
    if "model.safetensors" in found and "model.safetensors" not in listed:
        listed, stray = found - {"model.safetensors"}, {"model.safetensors"}
    else:
        stray = found - listed if listed & found else set()
    for pattern in ("pytorch_model*.bin", "consolidated*.pth", "*.gguf", "params.json"):
        stray |= {file.name for file in path.glob(pattern)} if found else set()
    if stray:
        names = ", ".join(sorted(stray))
        raise BaseModelError(
            f"{str(path)!r} holds {names} beside the model's own files: an engine may serve other "
            "weights than are tuned; take these files out of the directory"
        )


def content_revision(path: Path, *, cache: Path | None = None) -> str:
    """`sha256-` + hex over weights, configuration, tokenizer and template of the directory `path`.

    Versions of libraries, which saving writes into the configuration, don't count. About a second
    per GB.
    """
    files = sorted(path.glob("*.safetensors")) + [
        file for name in _PROMPT_FILES if (file := path / name).is_file()
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


def _check_mark(path: Path, template: str) -> None:
    """Raise `BaseModelError` where the template is another than when the directory was made.

    Its mark's revision stands for the template too.
    """
    marked = _read_json(path / MARK).get("template_hash") if (path / MARK).is_file() else None
    if marked not in (None, template):
        raise BaseModelError(
            f"the chat template in {str(path)!r} was changed in place: what was learned under the "
            f"old one would be served under another. Put it back, or make a copy of the directory "
            f"without {MARK}, which is another base"
        )


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
    """Read a safetensors file's header: each tensor's name with its `dtype` and `shape`.

    The format: https://github.com/huggingface/safetensors#format.
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
