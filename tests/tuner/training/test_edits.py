"""Which tokens of a better answer are more than copies."""

from __future__ import annotations

import pytest

from tuner.training.edits import mark_changes

END = 0


def _changed(before: str, after: str) -> str:
    """The letters of `after` that are marked, a dot for each other one; every answer ends."""
    marks = mark_changes([*map(ord, before)], [*map(ord, after), END])
    shown = [letter if mark else "." for letter, mark in zip(f"{after}$", marks, strict=True)]
    return "".join(shown)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("abcdefgh", "abcdefghXYZ", "........XYZ$"),  # something was added
        ("abcdefgh", "abcd", "....$"),  # it ends sooner
        ("abcdefgh", "abcXYfgh", "...XY...$"),  # something was exchanged
        ("abcdefgh", "abcfgh", "...f..$"),  # left out: what follows was preferred
        ("abcdefgh", "defgh", "d....$"),  # the same at the beginning
        ("abcdefgh", "XabYefghZ", "XabY....Z$"),  # two equal tokens in a row are chance
        ("abcdefgh", "abcdefgh", "........$"),
        ("", "abc", "abc$"),
        ("abc", "", "$"),
    ],
)
def test_what_is_more_than_a_copy_is_marked(before: str, after: str, expected: str) -> None:
    assert _changed(before, after) == expected
