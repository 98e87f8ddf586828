"""The normal form by which texts are compared, and what bounds its cost."""

from __future__ import annotations

import sys
import unicodedata
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.answers import messages_hash, root_hash
from feedback.curation.extract import build_near_hash, build_prompt_hash
from feedback.normal_form import LONGEST_RUN, _long_runs, cut_runs, normalise

MARKS = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.combining(chr(c))]
MOST_SORTED = 2 * LONGEST_RUN + 3  #: one character is at most two marks, a letter brings three
HOSTILE = [
    "a" + "\u0315\u0300\u0327" * 3_000,
    "".join(reversed(MARKS)) * 9,
    "\u0301\uff9e\uff9f\u0323" * 2_000,
    "\u0f73\u0f75\u0f81\u0344" * 2_000,
    ("\u0300" * 29 + "\u1f82" + "\u0301\u0323" * 40) * 30,
    "\U0001d165\u0fb7" * 4_000,
]


def longest_run(text: str) -> int:
    """Of marks, in what NFKC sorts."""
    kinds = map(unicodedata.combining, unicodedata.normalize("NFKD", text))
    return max((len(list(run)) for marked, run in groupby(kinds, bool) if marked), default=0)


@pytest.mark.parametrize("text", HOSTILE)
def test_only_so_many_marks_are_sorted_at_once(text: str) -> None:
    cut = cut_runs(text)
    assert longest_run(cut) <= MOST_SORTED
    assert len(cut) <= len(text) * (1 + 1 / LONGEST_RUN)
    assert cut.replace("\u034f", "") == text.replace("\u034f", "")


@given(st.text(st.sampled_from(["a", " ", "\u1f82", "가", "\ufdfa", "!", *MARKS]), max_size=200))
def test_any_mixture_of_letters_and_marks_is_bounded(text: str) -> None:
    assert longest_run(cut_runs(text)) <= MOST_SORTED


@pytest.mark.parametrize("marks", [LONGEST_RUN, LONGEST_RUN + 1, 2 * LONGEST_RUN])
def test_a_long_run_is_found_wherever_it_stands(marks: int) -> None:
    for before in range(2 * LONGEST_RUN + 3):
        for after in ("", "b" * 40):
            text = "a" * before + "\u0301" * marks + after
            assert (cut_runs(text) != text) == (marks > LONGEST_RUN)


def test_every_character_that_can_lengthen_a_run_is_cut() -> None:
    """Of all that Unicode has: what is marks alone in NFKD."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        parts = unicodedata.normalize("NFKD", character)
        if all(map(unicodedata.combining, parts)):
            assert len(parts) <= 2, hex(code)
            assert _long_runs().fullmatch(character * (LONGEST_RUN + 1)), hex(code)


@given(st.text(max_size=60))
def test_ordinary_text_has_the_form_that_it_always_had(text: str) -> None:
    expected = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    assert longest_run(text) > LONGEST_RUN or normalise(text) == expected


def test_a_text_becomes_at_most_eight_times_as_long() -> None:
    assert len(normalise("\ufdfa\ufdfb" * 5_000)) == 10_000
    assert normalise("x\ufdfa") == "xصلى الله عليه وسلم"
    longest = max(
        len(unicodedata.normalize("NFKC", chr(c)))
        for c in range(sys.maxunicode + 1)
        if chr(c) not in "\ufdfa\ufdfb"
    )
    assert longest <= 8


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("  What is\tRAIN? ", "what is rain?"),
        ("Cafe\u0301", "café"),
        ("ﬁne", "fine"),
        ("Straße", "STRASSE"),
        ("\u0323\u0301".join("ab"), "\u0301\u0323".join("ab")),
    ],
)
def test_case_accents_and_white_space_are_set_apart(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_texts_that_are_cut_are_still_told_apart() -> None:
    assert normalise("a" + "\u0300" * 40) != normalise("a" + "\u0316" * 40)


@pytest.mark.parametrize(
    ("text", "form", "root", "prompt", "near", "messages"),
    [
        ("What is  Rain?\n", "what is rain?", "b747e515", "856792f8", "67c956ae", "7f0efbd9"),
        ("STRASSE straße", "strasse strasse", "b217b82f", "6d1fb091", "d6a4e5c6", "8502bc41"),
        ("ﬁn ½ Ａ１", "fin 1⁄2 a1", "5c9cd071", "e15d1e6c", "2778179c", "3aa66abe"),
        ("e\u0301 é", "é é", "6279fe2f", "0e2520e9", "81141e5a", "143ce1d0"),
    ],
)
def test_what_is_stored_by_the_normal_form_never_changes(
    text: str, form: str, root: str, prompt: str, near: str, messages: str
) -> None:
    """Another value would move rows across the split and lose what was found before."""
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
    assert normalise(text) == form
    found = (root_hash(asked), build_prompt_hash(asked), build_near_hash(asked))
    assert [hash[:8] for hash in found] == [root, prompt, near]
    assert messages_hash("p", asked)[:8] == messages
