"""What can be seen of a text: whether there is anything, and whether two texts look the same.

Pure. Zero-width joiners and non-joiners change how Persian, Indic scripts and emoji look, so they
count where texts are compared; alone they show nothing.
"""

from __future__ import annotations

import re
import unicodedata

# Letters and symbols by their category that have no ink: fillers of Hangul, blank of Braille.
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
# Soft hyphen, zero-width space, marks of direction, word joiner and invisible operators, the byte
# order mark, tags.
_WITHOUT_INK = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


def is_blank(text: str) -> bool:
    """True where nothing of `text` can be seen: white space, controls, marks of format."""
    return all(
        character.isspace()
        or character in _BLANK
        or unicodedata.category(character) in ("Cc", "Cf", "Mn", "Me")
        for character in text
    )


def strip_invisible(text: str) -> str:
    """`text` without outer white space and without what has no ink in any script."""
    return _WITHOUT_INK.sub("", text).strip()
