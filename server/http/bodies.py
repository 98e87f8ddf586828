"""JSON bodies: bounded in size, depth and parts before they are parsed, and strict.

Owns: what no body may be, on any route. Does not own: what a route's body says.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pydantic_core import from_json
from starlette.types import Receive

from feedback.errors import BadRequest, TooLarge

MAX_DEPTH = 32


MAX_PARTS = 20_000  #: values in one body, whatever their size: each costs time of the event loop


_INTEGERS = (-(2**63), 2**64 - 1)


_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


_LONG_INTEGER = re.compile(rb"(?<![\w.+-])-?\d{19,}(?![\w.])")


_MAYBE_INFINITE = re.compile(rb"[eE]\+?\d\d|\d{300}")


_STEPS = bytes(
    1 if byte in b"[{" else 255 if byte in b"]}" else 0 for byte in range(256)
)  # as signed bytes: one down, one up


_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


WITHOUT_NUL = r"^[^\x00]*$"  #: PostgreSQL's text cannot hold one


def parse_body(raw: bytes, *, max_bytes: int, max_parts: int = MAX_PARTS) -> dict[str, Any]:
    """The body as a JSON object, or an error that says what is wrong with it."""
    if len(raw) > max_bytes:
        raise TooLarge(f"the body has {len(raw)} bytes, at most {max_bytes} are accepted")
    bare = _without_strings(raw)
    _check_shape(bare, max_parts)
    _check_integers(bare)
    try:
        body = from_json(raw, allow_inf_nan=False, cache_strings="keys")
        # Once more, for what the fast parser lets through: a key that stands twice (then fewer are
        # left than there were), a number that is no finite float. Nothing is nested too deeply for
        # this one by now.
        infinite = _MAYBE_INFINITE.search(bare)
        if infinite or bare.count(b":") != _count_pairs(body):
            parse_float = _finite if infinite else None
            json.loads(raw, object_pairs_hook=_refuse_twice, parse_float=parse_float)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, found {type(body).__name__}")
    return body


def _count_pairs(value: Any) -> int:
    """Pairs of key and value in all objects of a JSON value."""
    pairs, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            pairs += len(one)
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
    return pairs


def _without_strings(raw: bytes) -> bytes:
    """A JSON text without the contents of its strings; unspecified for invalid JSON."""
    return b"".join(raw.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])


def refuse_nul(raw: bytes) -> None:
    """Raises BadRequest where a string of the JSON text has a NUL."""
    if b"\\u0000" in raw and _NUL.search(raw):
        raise BadRequest("the body has a NUL in a string; nothing can store it")


def _check_shape(bare: bytes, max_parts: int) -> None:
    """Depth and number of parts, counted without parsing; `bare` is a body without its strings."""
    begun = bare.count(b"[") + bare.count(b"{")
    if begun + bare.count(b",") > max_parts:
        raise BadRequest(f"the body has more than {max_parts} values")
    if begun <= MAX_DEPTH:
        return
    steps = array("b", bare.translate(_STEPS, _NO_BRACKETS))
    if max(accumulate(steps), default=0) > MAX_DEPTH:
        raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_integers(bare: bytes) -> None:
    """No integer that 64 bits don't hold: nothing here counts so far, and parsing one is slow."""
    for found in _LONG_INTEGER.finditer(bare):
        digits = found[0]
        if len(digits) > 21 or not _INTEGERS[0] <= int(digits) <= _INTEGERS[1]:
            raise BadRequest(f"the integer {digits[:20].decode()}… does not fit into 64 bits")


def _refuse_twice(pairs: Sequence[tuple[str, Any]]) -> None:
    """Readers disagree on which of two equal keys counts, so neither does."""
    if len(dict(pairs)) == len(pairs):
        return
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"the key {name[:80]!r} stands twice in one object")
        seen.add(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


async def read_body(receive: Receive, most: int) -> bytes:
    """A request's body. Raises TooLarge beyond `most` bytes, BadRequest where it breaks off."""
    pieces, length, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the connection ended before the body did")
        piece = message.get("body", b"")
        length += len(piece)
        if length > most:
            raise TooLarge(f"the body passes {most} bytes")
        pieces.append(piece)
        more = message.get("more_body", False)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
