"""The holdout of an evaluation: which rows count, read from files when they are asked for.

Owns: what is left out because either release learned from it, and the order. Holds an index of the
rows, never the rows: a data set may be larger than memory. Reads no database.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from feedback.curation.extract import build_prompt_hash
from tuner.evaluation.gateway_client import Message

_ROWS_BETWEEN_CHECKS = 256


@dataclass(frozen=True, slots=True)
class HoldoutFiles:
    """JSONL files: of the holdout, and what the releases learned from or were chosen by."""

    held: Sequence[Path]
    learned: Sequence[Path]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row lies, and what it is known by: its kind, and 16 bytes of a hash each."""

    chance: bytes
    prompt: bytes
    kind: str
    path: Path
    offset: int


class Holdout(Sequence[Mapping[str, Any]]):
    """Rows that neither release learned from, in an order that says nothing about them.

    Looks through all files once, calling `check` in between. Raises `FileNotFoundError`.
    """

    def __init__(self, files: HoldoutFiles, *, check: Callable[[], None] = lambda: None) -> None:
        places = [
            _Place(_hash_id(row), _hash_prompt(row), sys.intern(str(row.get("kind"))), path, offset)
            for path in files.held
            for offset, row in _read(path, check)
        ]
        ids = {place.chance for place in places}
        prompts = {place.prompt for place in places}
        learned = set[bytes]()
        for path in files.learned:
            for _, row in _read(path, check):
                learned |= {_hash_id(row)} & ids
                learned |= {_hash_prompt(row)} & prompts
        self._places = sorted(
            (
                place
                for place in places
                if place.chance not in learned and place.prompt not in learned
            ),
            key=lambda place: place.chance,
        )
        self.left_out = len(places) - len(self._places)

    def list_kinds_and_prompts(self) -> list[tuple[str, str]]:
        """Kind and hash of the prompt (`build_prompt_hash`) of each row; no file is read."""
        return [(place.kind, place.prompt.hex()) for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        """The row, or the rows of a slice, from the files."""
        if isinstance(index, slice):
            return [_read_at(place) for place in self._places[index]]
        return _read_at(self._places[index])


def _read_at(place: _Place) -> Mapping[str, Any]:
    with place.path.open("rb") as stream:
        stream.seek(place.offset)
        row: Mapping[str, Any] = json.loads(stream.readline())
    return row


def _read(path: Path, check: Callable[[], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(offset, row) of each row."""
    with path.open("rb") as stream:
        offset = 0
        for number, line in enumerate(stream):
            if number % _ROWS_BETWEEN_CHECKS == 0:
                check()
            if line.strip():
                yield offset, json.loads(line)
            offset += len(line)


def _hash_id(row: Mapping[str, Any]) -> bytes:
    """Of a row without an id: of all of it."""
    named = str(row["id"]) if row.get("id") is not None else json.dumps(row, sort_keys=True)
    return hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()[:16]


def _hash_prompt(row: Mapping[str, Any]) -> bytes:
    return bytes.fromhex(build_prompt_hash(_prompt_of(row)))


def _prompt_of(row: Mapping[str, Any]) -> Sequence[Message]:
    """The prompt in either dialect."""
    if "prompt" in row:
        prompt: Sequence[Message] = row["prompt"]
    elif "input" in row:
        prompt = row["input"]["messages"]
    else:
        prompt = row["messages"][:-1]
    return prompt
