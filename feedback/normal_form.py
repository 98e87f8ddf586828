"""What of a text counts when two are compared: not case, the form of accents, or white space.

Pure. Its cost is linear in the text's length, whatever the text: NFKC sorts a run of combining
marks in quadratic time, so long runs are cut before, as in the stream-safe form of Unicode (UAX
#15, section 13). No language writes more than a few marks on a letter.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

LONGEST_RUN = 30  #: combining characters on one letter; UAX #15 has this number
_JOINER = "\u034f"  #: combining grapheme joiner: marks are not sorted across it

_MARKS_END = 0x1E950  #: behind the last combining character
_MARKS_IN_EFFECT = "\u0f73\u0f75\u0f81\uff9e\uff9f"  #: what NFKD makes of them is marks alone
_LIGATURES = ("\ufdfa", "\ufdfb")  #: 18 and 8 characters in NFKC, six times what any other is


def normalise(text: str) -> str:
    """`text` case-folded, in NFKC, with white space collapsed."""
    if not text.isascii():
        # A text that is full of whole phrases in one character stays as it is written.
        whole = sum(map(text.count, _LIGATURES)) * 8 <= len(text) or len(text) < 1_000
        text = unicodedata.normalize("NFKC" if whole else "NFC", cut_runs(text))
    return " ".join(text.casefold().split())


def cut_runs(text: str) -> str:
    """`text` with a joiner after every 30 combining characters in a row, others as they are."""
    return _long_runs().sub(_cut, text) if _has_long_run(text) else text


def _has_long_run(text: str) -> bool:
    # A long run has a character at one of these places: ordinary text is hardly looked at.
    marks, step = _marks(), LONGEST_RUN + 1
    for number, character in enumerate(text[::step]):
        if character in marks:
            first = last = number * step
            while first > 0 and last - first < LONGEST_RUN and text[first - 1] in marks:
                first -= 1
            while last + 1 < len(text) and last - first < LONGEST_RUN and text[last + 1] in marks:
                last += 1
            if last - first == LONGEST_RUN:
                return True
    return False


def _cut(found: re.Match[str]) -> str:
    run = found[0]
    return _JOINER.join(run[at : at + LONGEST_RUN] for at in range(0, len(run), LONGEST_RUN))


@cache
def _marks() -> frozenset[str]:
    # Every code point is looked at: some milliseconds, once.
    marks = {chr(c) for c in range(0x300, _MARKS_END) if unicodedata.combining(chr(c))}
    return frozenset(marks | set(_MARKS_IN_EFFECT))


@cache
def _long_runs() -> re.Pattern[str]:
    return re.compile(f"[{''.join(sorted(_marks()))}]{{{LONGEST_RUN + 1},}}")
