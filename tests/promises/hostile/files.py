"""Hostile files: small ones that become large, wide, deep or endless where they are read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from tests.promises.hostile.sending import Hostile, Target, upload

MIB = 1024 * 1024
ROW = {"prompt": "Which bird?", "completion": "A heron."}
CHAT = [{"role": "user", "content": "Which bird?"}, {"role": "assistant", "content": "A heron."}]


def _later(name: str, build: Callable[[], bytes], **fields: str) -> Hostile:
    """A file that is built when it is sent: corpora are listed whenever tests are."""

    def send(target: Target) -> int | None:
        return upload(name, "rows", build(), **fields).send(target)

    return Hostile(f"file: {name}", send)


def _table(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink, compression="zstd", **options)
    return sink.getvalue()


def _repeated_text() -> bytes:
    """One text of 8 MiB that 64 rows name."""
    import pyarrow

    text = pyarrow.DictionaryArray.from_arrays([0] * 64, ["x" * 8 * MIB])
    return _table({"prompt": ["a"] * 64, "completion": text, "junk": text})


def _repeated_turns() -> bytes:
    """Two turns, of 4 MiB, in each of 30 rows."""
    turns = [CHAT[0], {"role": "assistant", "content": "x" * 4 * MIB}]
    return _table({"messages": [turns] * 30}, dictionary_pagesize_limit=16 * MIB)


def _many_rows() -> bytes:
    import pyarrow

    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2_000_000), ["a"])
    return _table({"prompt": same, "completion": same})


def _wide() -> bytes:
    return _table({**{name: ["a"] for name in ROW}, **{f"c{n}": [1] for n in range(12_000)}})


def _long_footer() -> bytes:
    whole = _table({name: [text] for name, text in ROW.items()})
    return whole[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", b"\n" * 50 * MIB)
    return sink.getvalue()


def _line(**more: Any) -> bytes:
    return json.dumps({**ROW, **more}).encode() + b"\n"


CORPUS: list[Hostile] = [
    _later("parquet of one text many times", _repeated_text),
    _later("parquet of turns many times", _repeated_turns),
    _later("parquet of two million rows", _many_rows),
    _later("parquet of twelve thousand columns", _wide),
    _later("parquet with a footer of 2 GiB", _long_footer),
    _later("CSV with a field of 10 MB", lambda: b'prompt,completion\na,"' + b"x" * 10_000_000),
    _later("CSV of a million columns", lambda: b"," * 1_000_000 + b"\n" + b"a," * 1_000_000),
    _later("CSV of half a million names", lambda: b",".join(b"%d" % n for n in range(500_000))),
    _later("CSV that names its last column twice",
           lambda: b",".join(b"%d" % n for n in [*range(9_000), 8_999]) + b"\n"),
    _later("depth 100 000", lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    _later("an array of depth 1 000 000", lambda: b"[" * 1_000_000),
    _later("a hundred thousand keys, the last one twice",
           lambda: b"{" + b"".join(b'"%d":1,' % n for n in range(100_000)) + b'"99999":1}'),
    _later("a million digits", lambda: b'{"a":' + b"9" * 1_000_000 + b"}"),
    _later("gzip of 50 MiB", lambda: gzip.compress(b"\n" * 50 * MIB)),
    _later("deflate of 50 MiB", lambda: zlib.compress(b"\n" * 50 * MIB)),
    _later("bzip2 of 50 MiB", lambda: bz2.compress(b"\n" * 50 * MIB)),
    _later("zstd by its mark", lambda: b"\x28\xb5\x2f\xfd" + bytes(1_000)),
    _later("zip of 50 MiB", _zip),
    _later("a row of 900 KB", lambda: _line(source="x" * 900_000)),
    _later("a million blank lines", lambda: _line() + b"\n" * 1_000_000),
    _later("a chat of three thousand answers",
           lambda: json.dumps({"messages": CHAT * 3_000}).encode()),
    _later("NUL", lambda: _line(prompt="a\x00b") + b"\x00" * 100_000),
    _later("half a surrogate pair", lambda: _line(prompt="\ud800")),
    _later("columns mapped ten thousand times", _line,
           columns=json.dumps({f"c{n}": "a" for n in range(4_000)})),
]  # fmt: skip
