"""Checkpoints: all that a run needs to go on as if it had never stopped.

Owns: folders that appear whole or not at all, the manifest of hashes that is the last file in each
of them, and which checkpoint a run may resume from. Tensors lie in safetensors, the rest in JSON;
nothing is pickled. Does not own: what a run keeps (`loop.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

MANIFEST: Final = "manifest.json"

_STATE = "state.json"
_INCOMING = ".incoming-"
_KEEP = 2


class _Unusable(Exception):
    """A checkpoint that is not resumed from; the message says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run between two steps."""

    step: int  #: optimizer steps that are done
    tensors: Mapping[str, Mapping[str, Tensor]]  #: one file each, by name
    state: Mapping[str, Any]  #: JSON


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; the newest two are kept.

    `identity` names the run: a checkpoint of another one is never resumed from.
    """

    def __init__(self, root: Path, identity: str) -> None:
        self._root = root
        self._identity = identity

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove all but the newest two."""
        files = {
            f"{name}.safetensors": save(dict(tensors))
            for name, tensors in checkpoint.tensors.items()
        }
        state = {"step": checkpoint.step, **checkpoint.state}
        files[_STATE] = json.dumps(state, sort_keys=True).encode()
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = {"identity": self._identity, "files": hashes}
        files[MANIFEST] = json.dumps(manifest, indent=2, sort_keys=True).encode()
        write_folder(self._root / f"step-{checkpoint.step:08d}", files)
        for folder in self._newest_first()[_KEEP:]:
            shutil.rmtree(folder)

    def restore(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole and of this run, and a sentence for each that isn't.

        The latter are removed, so that they never stand in the place of a good one.
        """
        for left in self._root.glob(f"{_INCOMING}*"):
            shutil.rmtree(left)
        refused: list[str] = []
        for folder in self._newest_first():
            try:
                return self._read(folder), refused
            except _Unusable as error:
                refused.append(f"Checkpoint {folder.name!r} was not used: {error}.")
                shutil.rmtree(folder)
        return None, refused

    def _newest_first(self) -> list[Path]:
        return sorted(self._root.glob("step-*"), reverse=True)

    def _read(self, folder: Path) -> Checkpoint:
        manifest = _parse(_read_file(folder / MANIFEST), MANIFEST)
        if manifest.get("identity") != self._identity:
            raise _Unusable("it belongs to a run with other settings, data or libraries")
        hashes = manifest.get("files")
        if not isinstance(hashes, dict) or _STATE not in hashes:
            raise _Unusable(f"{MANIFEST!r} lists no {_STATE!r}")
        contents: dict[str, bytes] = {}
        for name, expected in hashes.items():
            contents[name] = _read_file(folder / name)
            if hashlib.sha256(contents[name]).hexdigest() != expected:
                raise _Unusable(f"{name!r} has changed since it was written")
        state = _parse(contents.pop(_STATE), _STATE)
        try:
            tensors = {Path(name).stem: load(content) for name, content in contents.items()}
            return Checkpoint(int(state.pop("step")), tensors, state)
        except (SafetensorError, KeyError) as error:
            raise _Unusable(f"it can't be read ({error})") from None


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that appears whole, in place of what `target` held before.

    The files are written in their order, beside `target`, and are on disk before its name is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = target.with_name(f"{_INCOMING}{target.name}")
    shutil.rmtree(incoming, ignore_errors=True)  # left by a run that was killed
    incoming.mkdir()
    for name, content in files.items():
        with (incoming / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync(incoming)
    shutil.rmtree(target, ignore_errors=True)
    incoming.rename(target)
    _sync(target.parent)


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _Unusable(f"{file.name!r} is missing ({error.strerror})") from None


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError:
        raise _Unusable(f"{name!r} is no JSON") from None
    if not isinstance(parsed, dict):
        raise _Unusable(f"{name!r} holds {type(parsed).__name__}, expected an object")
    return parsed


def _sync(folder: Path) -> None:
    """Force a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
