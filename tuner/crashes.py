"""What may be told of an error that nobody foresaw.

Its own words may repeat what people wrote (a key that was not found, a text that could not be
encoded), and these get into logs and into what a job says of itself. Does not own: errors whose
words are chosen here (`work/reasons.py`).
"""

from __future__ import annotations

import traceback
from pathlib import Path


def describe_crash(error: BaseException) -> str:
    """The error's type and where it was raised, without its words."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def trace_of(error: BaseException) -> list[str]:
    """The calls that led to the error, outermost first, without any words of it."""
    return [
        f"{frame.filename}:{frame.lineno} in {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
