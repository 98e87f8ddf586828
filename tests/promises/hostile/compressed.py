"""Hostile compressed bodies: what becomes gigabytes, and what becomes nothing for ever."""

from __future__ import annotations

import gzip
import zlib

from backports import zstd

from tests.promises.hostile.sending import CHAT, Hostile, request

MIB = 1024 * 1024


def _zeros_in_deflate(encoder: zlib._Compress) -> bytes:
    """Four GiB of zeros: after a full flush the same bytes mean the same again."""
    head = encoder.flush(zlib.Z_FULL_FLUSH)
    return head + (encoder.compress(bytes(16 * MIB)) + encoder.flush(zlib.Z_FULL_FLUSH)) * 256


_NOTHING = zlib.compressobj(wbits=-15).flush(zlib.Z_FULL_FLUSH)
_FORM = {"content-type": "multipart/form-data; boundary=x"}

CONTENTS: dict[str, tuple[str, bytes]] = {
    "4 GiB in gzip": ("gzip", _zeros_in_deflate(zlib.compressobj(wbits=31))),
    "4 GiB in zstd": ("zstd", zstd.compress(bytes(64 * MIB)) * 64),
    "a bomb in a bomb": ("gzip, gzip", gzip.compress(gzip.compress(bytes(64 * MIB)))),
    "parts without number": ("gzip", gzip.compress(b"") * 50_000),
    "frames to skip": ("zstd", b"\x50\x2a\x4d\x18\x00\x00\x00\x00" * 130_000),
    "blocks of nothing": ("deflate", _NOTHING * 400_000),
    "a window of 2 GiB": ("zstd", b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00"),
    "no gzip": ("gzip", b"x" * MIB),
}

CORPUS: list[Hostile] = [
    request(f"{name}, {path}", path, content, {"content-encoding": encoding, **more})
    for name, (encoding, content) in CONTENTS.items()
    for path, more in ((CHAT, {}), ("/v1/feedback", {}), ("/v1/files", _FORM))
]
