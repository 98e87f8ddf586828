"""JSON that fits a JSON schema: what the fake engine says where a real one is held to a schema.

Owns: one instance for a schema, always the same. Knows types, `enum`, `const`, `anyOf`, `oneOf`,
`allOf`, local `$ref`, `minimum` and `minItems`; other limits are passed over, and what is optional
is said too. Does not own: which request asks for one (`requests.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 16  #: a schema may contain itself: below this, what is optional is left out


def build_instance(schema: Mapping[str, Any], text: str) -> Any:
    """An instance of `schema` in which every string without rules of its own is `text`."""
    return _instance(schema, schema, text, 0)


def _instance(schema: Any, root: Mapping[str, Any], text: str, depth: int) -> Any:
    if not isinstance(schema, Mapping):
        return text  # `true`, or nothing that says what it wants
    if "$ref" in schema:
        return _instance(_resolve(str(schema["$ref"]), root), root, text, depth)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf", "allOf"):
        if schema.get(choice):
            return _instance(schema[choice][0], root, text, depth)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object" or (kind is None and "properties" in schema):
        return _object(schema, root, text, depth + 1)
    if kind == "array":
        count = max(int(schema.get("minItems", 0)), 0 if depth >= MAX_DEPTH else 1)
        return [_instance(schema.get("items"), root, text, depth + 1) for _ in range(count)]
    plain = {
        "integer": int(schema.get("minimum", 7)),
        "number": float(schema.get("minimum", 7.5)),
        "boolean": True,
        "null": None,
    }
    return plain.get(str(kind), text)


def _object(schema: Mapping[str, Any], root: Mapping[str, Any], text: str, depth: int) -> Any:
    required = schema.get("required", ())
    return {
        name: _instance(part, root, text, depth)
        for name, part in schema.get("properties", {}).items()
        if name in required or depth <= MAX_DEPTH
    }


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What `#/…` points at; nothing where it points elsewhere."""
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if part else found
        if not isinstance(found, Mapping):
            return None
    return found
