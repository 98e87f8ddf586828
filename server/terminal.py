"""What this program writes for people to read, on a terminal or wherever its output goes.

Owns: output that survives a reader who has left, a terminal that was closed and an encoding that
lacks a letter; text of others without control characters. Does not own: what is said.
"""

from __future__ import annotations

import io
import os
import re
import sys
from typing import TextIO

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What moves a terminal's cursor, turns a text round, ends a line unseen, or is half a letter. Line
ends and tabs are harmless.
"""


def printable(text: str) -> str:
    r"""`text` with control characters written out, as `\x1b`."""
    return text if text.isprintable() else _STEERING.sub(_write_out, text)


def _write_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def as_json_escapes(text: str) -> str:
    """JSON that means the same and holds no control character but its line ends."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def prepare_output() -> None:
    """Let both outputs write out the letters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write_line(text: str) -> None:
    """One line on standard output, at once; lost without an error where nobody reads any more."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Send what is still written there nowhere: what is buffered would fail again at the end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # no file stands behind it
