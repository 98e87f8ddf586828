"""The values that each kind of verdict may have, and the bounds on what people write.

Pure rules; each function returns the value as it is stored or raises BadRequest. Does not own the
rows (`judgements.py`, `comparisons.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from feedback.db import canonical_json
from feedback.errors import BadRequest
from feedback.numbers import whole
from feedback.tables import JudgementKind, SourceType

MAX_COMMENT_CHARS = 10_000
MAX_CORRECTION_CHARS = 100_000
MAX_REASONS = 16
MAX_REASON_CHARS = 200
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_NAME_CHARS = 64
MAX_ID_CHARS = 128
MAX_SIGNAL_CHARS = 1_000
MAX_SIGNALS = 16  #: names, of one person about one choice
MAX_SIGNAL_INTEGER = 2**63

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def check_text(value: object, param: str, *, max_chars: int) -> str:
    """`value` where it is text that both databases can store, of at most `max_chars` characters."""
    if not isinstance(value, str):
        raise BadRequest(f"{param} must be a string, found {_show(value)}", param=param)
    if len(value) > max_chars:
        raise BadRequest(
            f"{param} has {len(value)} characters, at most {max_chars} are taken", param=param
        )
    unstorable = _UNSTORABLE.search(value)
    if unstorable is not None:
        raise BadRequest(
            f"{param} has a character that cannot be stored, U+{ord(unstorable[0]):04X} at "
            f"{unstorable.start()}",
            param=param,
        )
    return value


def check_id(value: str | None, param: str) -> str | None:
    """An identifier given by the client, or None."""
    if value is None:
        return None
    if not value:
        raise BadRequest(f"{param} is empty; leave it out or give it a value", param=param)
    return check_text(value, param, max_chars=MAX_ID_CHARS)


def check_comment(value: str | None) -> str | None:
    """The free text beside a verdict."""
    return None if value is None else check_text(value, "comment", max_chars=MAX_COMMENT_CHARS)


def check_reasons(values: Sequence[str] | None) -> list[str] | None:
    """Short reasons, such as the tags of a form."""
    if values is None:
        return None
    if len(values) > MAX_REASONS:
        raise BadRequest(
            f"{len(values)} reasons were given, at most {MAX_REASONS} are taken", param="reasons"
        )
    return [check_text(value, "reasons", max_chars=MAX_REASON_CHARS) for value in values]


def check_metadata(pairs: Mapping[str, str] | None) -> dict[str, str] | None:
    """The team's own pairs, within the bounds that OpenAI's API sets."""
    if pairs is None:
        return None
    if len(pairs) > MAX_METADATA_PAIRS:
        raise BadRequest(
            f"metadata has {len(pairs)} pairs, at most {MAX_METADATA_PAIRS} are taken",
            param="metadata",
        )
    return {
        check_text(key, "metadata", max_chars=MAX_METADATA_KEY_CHARS): check_text(
            value, "metadata", max_chars=MAX_METADATA_VALUE_CHARS
        )
        for key, value in pairs.items()
    }


def check_source(source_type: str, source_id: str) -> None:
    """Who or what passed the verdict."""
    if source_type not in frozenset(SourceType):
        raise BadRequest(
            f"source type {source_type!r} is not known; it is one of {_list(SourceType)}",
            param="source",
        )
    check_text(source_id, "source", max_chars=MAX_ID_CHARS)


def check_kind(kind: str, name: str) -> JudgementKind:
    """The kind, with the name that it needs or must not have."""
    if kind not in frozenset(JudgementKind):
        raise BadRequest(
            f"kind {kind!r} is not known; it is one of {_list(JudgementKind)}", param="kind"
        )
    check_text(name, "name", max_chars=MAX_NAME_CHARS)
    if kind == JudgementKind.SIGNAL and not name:
        raise BadRequest("a signal needs a name, such as 'regenerated' or 'copied'", param="name")
    if kind != JudgementKind.SIGNAL and name:
        raise BadRequest(
            f"name belongs to kind 'signal', found {name!r} with kind {kind!r}; for a measure of "
            "your own use kind 'signal'",
            param="name",
        )
    return JudgementKind(kind)


def check_value(kind: JudgementKind, value: Any) -> Any:
    """Check `value` and return it as it is stored.

    None (withdrawn) goes with every kind. A correction becomes an assistant message.
    """
    if value is None:
        return None
    match kind:
        case JudgementKind.RATING:
            return _check_rating(value)
        case JudgementKind.STARS:
            return _check_stars(value)
        case JudgementKind.CORRECTION:
            return _check_correction(value)
        case JudgementKind.COMMENT:
            return _check_filled(value, "a comment", max_chars=MAX_COMMENT_CHARS)
        case JudgementKind.SIGNAL:
            return _check_signal(value)


def _check_rating(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(
            f"rating takes true or false, found {_show(value)}; for a scale use kind 'stars' "
            "(1 to 5)",
            param="value",
        )
    return value


def _check_stars(value: Any) -> int:
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 5:
        raise BadRequest(
            f"stars takes a whole number from 1 to 5, found {_show(value)}; for yes or no use "
            "kind 'rating' (true or false)",
            param="value",
        )
    return value


def _check_filled(value: Any, what: str, *, max_chars: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(
            f"{what} must be a text that is not empty, found {_show(value)}", param="value"
        )
    return check_text(value, "value", max_chars=max_chars)


def _check_correction(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        text = _check_filled(value, "a correction", max_chars=MAX_CORRECTION_CHARS)
        return {"role": "assistant", "content": text}
    if not isinstance(value, dict) or value.get("role") != "assistant":
        raise BadRequest(
            'a correction is a text, or a message {"role": "assistant", "content": …}, found '
            + _show(value),
            param="value",
        )
    unknown = sorted(set(value) - {"role", "content", "tool_calls"})
    if unknown:
        raise BadRequest(
            "a correction's message has role, content and tool_calls; found "
            f"{', '.join(map(repr, unknown))} too",
            param="value",
        )
    calls = value.get("tool_calls")
    if not calls:
        text = _check_filled(value.get("content"), "a correction", max_chars=MAX_CORRECTION_CHARS)
        return {"role": "assistant", "content": text}
    content = value.get("content")
    if content is not None:
        check_text(content, "value", max_chars=MAX_CORRECTION_CHARS)
    return {"role": "assistant", "content": content, "tool_calls": _check_tool_calls(calls)}


def _check_tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Check that calls of tools have OpenAI's shape and nothing else.

    It is `{"id", "type": "function", "function": {"name", "arguments"}}`.
    """
    if not isinstance(calls, list):
        raise BadRequest(f"tool_calls must be a list, found {_show(calls)}", param="value")
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise BadRequest(
                'each of tool_calls must be {"id", "type": "function", "function": '
                '{"name", "arguments"}}, found ' + _show(call),
                param="value",
            )
        texts = {
            "id": call.get("id", ""),
            "name": function.get("name"),
            "arguments": function.get("arguments"),
        }
        for part, text in texts.items():
            check_text(text, f"tool_calls.{part}", max_chars=MAX_CORRECTION_CHARS)
        checked.append(
            {
                "id": texts["id"],
                "type": "function",
                "function": {"name": texts["name"], "arguments": texts["arguments"]},
            }
        )
    if len(canonical_json(checked)) > MAX_CORRECTION_CHARS:
        raise BadRequest(
            f"tool_calls take more than {MAX_CORRECTION_CHARS} characters", param="value"
        )
    return checked


def _check_signal(value: Any) -> str | int | float | bool:
    if isinstance(value, str):
        return check_text(value, "value", max_chars=MAX_SIGNAL_CHARS)
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < MAX_SIGNAL_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise BadRequest(
        f"a signal's value is a text, a number or true or false, found {_show(value)}",
        param="value",
    )


def _show(value: object) -> str:
    """`value` for a message, short whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and (
        not isinstance(value, int) or abs(value) < MAX_SIGNAL_INTEGER
    ):
        return repr(value)
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    if isinstance(value, str):
        return "a longer text"
    if isinstance(value, int | float):
        return "a number too large"
    return "an object" if isinstance(value, dict) else "a list"


def _list(words: type[JudgementKind] | type[SourceType]) -> str:
    return ", ".join(repr(word.value) for word in words)
