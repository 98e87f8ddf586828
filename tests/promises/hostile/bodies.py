"""Hostile JSON: what parses for long, takes much room, or is read differently by two readers."""

from __future__ import annotations

from tests.promises.hostile.sending import CHAT, TEXT, Hostile, request

MIB = 1024 * 1024


def chat(value: bytes) -> bytes:
    """A chat whose one field more is `value`."""
    return (
        b'{"model": "assistant", "messages": [{"role": "user", "content": "hi"}], "seed": '
        + value
        + b"}"
    )


CONTENTS = {
    "1 MiB and 1": b'{"model": "' + b"x" * (MIB - 12) + b'"}',
    "depth 100 000": chat(b"[" * 100_000 + b"]" * 100_000),
    "objects, depth 100 000": chat(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "depth 33": chat(b"[" * 32 + b"]" * 32),
    "half a million lists": chat(b"[" + b"[]," * (MIB // 3 - 100) + b"[]]"),
    "NaN": chat(b"NaN"),
    "Infinity": chat(b"-Infinity"),
    "1e999": chat(b"1e999"),
    "many 1e999": chat(b"[" + b"1e999," * 150_000 + b"1]"),
    "5 000 digits": chat(b"9" * 5000),
    "1 000 000 digits": chat(b"9" * 1_000_000),
    "65 bits": chat(b"18446744073709551616"),
    "a lone surrogate": chat(rb'"\ud800"'),
    "the other half": chat(rb'"\udfff"'),
    "NUL": b'{"model": "assistant", "messages": [{"role": "user", "content": "a\\u0000b"}]}',
    "a raw NUL": chat(b'"\x00"'),
    "duplicate keys": chat(b'1, "model": "assistant"'),
    "a late duplicate": chat(
        b"{" + b"".join(b'"%d":1,' % n for n in range(19_000)) + b'"18999":1}'
    ),
    "a hundred thousand keys": chat(b"{" + b",".join(b'"%d":1' % n for n in range(100_000)) + b"}"),
    "half a million integers": chat(b"[" + b"1," * 500_000 + b"1]"),
    "a hundred thousand strings": chat(b"[" + b'"",' * 100_000 + b"1]"),
    "broken UTF-8": chat(b'"\xff\xfe"'),
    "an open string": chat(b'"' + b"\\" * 500_000),
    "backslashes and quotes": chat(b'"' + b'\\"' * 500_000),
    "quotes": b'"' * (MIB - 1),
    "nothing": b"",
}
"""Refused by every route that takes a body."""

MANY_UNKNOWN = b"".join(b', "u%d": 1' % n for n in range(19_900))
"""Fields that a chat or a completion takes and ignores, as many as a body may have."""

CORPUS: list[Hostile] = [
    *(
        request(f"{name}, {path}", path, content)
        for name, content in CONTENTS.items()
        for path in (CHAT, TEXT, "/v1/feedback")
    ),
    request("19 900 unknown fields", CHAT, chat(b"1" + MANY_UNKNOWN)),
    request(
        "19 900 unknown fields of a text",
        TEXT,
        b'{"model": "assistant", "prompt": "hi"' + MANY_UNKNOWN + b"}",
    ),
]
