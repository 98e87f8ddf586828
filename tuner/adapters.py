"""LoRA adapters as files: canonical form, identity by content hash, and the store.

Owns: the two files of an adapter (`adapter_config.json`, `adapter_model.safetensors`), the hash
that names them, and the content-addressed folder that engines load from. Does not own: what is
checked of the files (`adapter_checks.py`), rows in the database, how adapters are trained, whether
an engine applies them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
MAX_CONFIG_BYTES: Final = 64 * 1024


class AdapterRefused(Exception):
    """An adapter that may not be stored, loaded or promoted.

    `code` is stable; the message is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a checked adapter is: identity, size and shape."""

    content_hash: str  #: 64 hex digits; names the adapter
    r: int  #: rank
    lora_alpha: float
    target_modules: tuple[str, ...]  #: last parts of the adapted modules' names, sorted
    parameters: int
    size_bytes: int  #: both files together
    dtype: str  #: float32, float16 or bfloat16


def build_adapter_config(
    *,
    r: int,
    lora_alpha: float,
    target_modules: Iterable[str],
    base_name: str,
    base_revision: str | None,
) -> bytes:
    """Return the canonical `adapter_config.json`: sorted, without path or library version.

    Both peft and vLLM read it; the same adapter gives the same bytes on every machine and in every
    release.
    """
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else float(lora_alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "revision": base_revision,
        "target_modules": sorted(set(target_modules)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def content_hash(folder: Path) -> str:
    """Return the SHA-256 over the two files in `folder`, 64 hex digits: the adapter's name."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def adapter_id(full_hash: str) -> str:
    """Return the public id of an adapter: `ad_` and the first 24 hex digits of its content hash."""
    return f"ad_{full_hash[:24]}"


class AdapterStore:
    """Adapters in folders named by their content hash, under one root that engines can read.

    A folder never changes after it appeared: it is written beside its place, forced to disk and
    renamed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, full_hash: str) -> Path:
        """Return the folder of an adapter; raises `ValueError` for anything but 64 hex digits."""
        if re.fullmatch(r"[0-9a-f]{64}", full_hash) is None:
            raise ValueError(f"{full_hash!r} is no content hash; expected 64 hex digits")
        return self.root / full_hash

    def verify(self, full_hash: str) -> None:
        """Check that the stored files still have that hash.

        Raises `AdapterRefused` (`missing_file`, `damaged`).
        """
        folder = self.path(full_hash)
        try:
            found = content_hash(folder)
        except FileNotFoundError as error:
            name = Path(str(error.filename)).name
            raise AdapterRefused(
                "missing_file", f"{name!r} of adapter {full_hash} is not in the store"
            ) from None
        if found != full_hash:
            raise AdapterRefused(
                "damaged", f"adapter {full_hash} has changed on disk; its files now hash to {found}"
            )

    def put(self, folder: Path) -> str:
        """Copy the adapter's two files into the store and return its content hash.

        Twice is as good as once; what was damaged in the store is replaced. The caller checks the
        adapter first (`check_adapter`).
        """
        self.root.mkdir(parents=True, exist_ok=True)
        incoming = self.root / f".incoming-{uuid.uuid4().hex}"
        incoming.mkdir()
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(folder / name, incoming / name, follow_symlinks=False)
                _sync(incoming / name)
            _sync(incoming)
            # Of the copy, so that a change of the source meanwhile cannot slip in.
            full_hash = content_hash(incoming)
            self._install(incoming, full_hash)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        self.verify(full_hash)
        return full_hash

    def _install(self, incoming: Path, full_hash: str) -> None:
        target = self.path(full_hash)
        if target.exists():
            try:
                self.verify(full_hash)
            except AdapterRefused:
                shutil.rmtree(target)
            else:
                return
        try:
            incoming.rename(target)
        except OSError:
            self.verify(full_hash)  # another process stored the same content first
        _sync(self.root)


def _sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
