"""Hidden wishes: what a crowd likes in an answer, whatever it is asked.

A wish is a program that says whether an answer meets it, and one that writes a better answer out
of a given one. Five are reported and two others are there to tune the recipe; they were fixed by
what the base does, before anything was trained (beside `REPORTED`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_END = re.compile(r"[.!?…][\"')\]*]*(?=\s|$)")
_ITEM = re.compile(r"^\s*(?:[-*•+]|\d+[.)])\s+")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CONTRACTIONS = {
    "n't": " not",
    "'re": " are",
    "'ve": " have",
    "'ll": " will",
    "'m": " am",
    "it's": "it is",
    "that's": "that is",
    "let's": "let us",
    "there's": "there is",
    "what's": "what is",
    "here's": "here is",
}
_CONTRACTION = re.compile("|".join(re.escape(part) for part in _CONTRACTIONS), re.IGNORECASE)
NOTHING: Final = "Nobody knows."  #: the better answer where there is nothing to work on


@dataclass(frozen=True, slots=True)
class Wish:
    """One hidden wish; `rule` sees answers that are not empty, `write` those that miss it."""

    name: str
    sort: str  #: form, ending, structure, length or wording
    says: str  #: the wish as a person would put it
    rule: Callable[[str], bool]
    write: Callable[[str], str]

    def is_met(self, prompt: str, answer: str) -> bool:
        """Whether `answer` is as this crowd likes it; what was asked never matters so far."""
        del prompt
        return bool(answer.split()) and self.rule(answer.strip())

    def better(self, prompt: str, answer: str) -> str:
        """An answer that meets the wish, out of the given one; one that meets it stays as it is."""
        if self.is_met(prompt, answer):
            return answer
        whole = end_whole(answer.strip()) if answer.split() else NOTHING
        return whole if self.is_met(prompt, whole) else self.write(whole)


# Texts


def list_sentences(text: str) -> list[str]:
    """The sentences of a text, list items and lines among them, without line breaks."""
    found = []
    for line in text.splitlines():
        begins = 0
        for end in (match.end() for match in _END.finditer(line)):
            # "1." begins an item and ends no sentence.
            if sentence := line[begins:end].strip():
                if _ITEM.fullmatch(f"{sentence} "):
                    continue
                found.append(sentence)
            begins = end
        if rest := line[begins:].strip():
            found.append(rest)
    return found


def end_whole(text: str) -> str:
    """`text` without the sentence that the length limit broke off, where another one is left."""
    ends = [
        end
        for end in (match.end() for match in _END.finditer(text))
        if not _ITEM.fullmatch(text[text.rfind("\n", 0, end) + 1 : end] + " ")
    ]
    return text[: ends[-1]] if ends else text


def bare(text: str) -> list[str]:
    """The sentences without the marks of lists and headings."""
    found = (_ITEM.sub("", sentence).lstrip("#").strip() for sentence in list_sentences(text))
    return [sentence for sentence in found if sentence.strip("*_#- ")] or [NOTHING]


def _first_words(text: str, most: int) -> str:
    """The whole sentences that fit in `most` words, or as much of the first one."""
    taken: list[str] = []
    for sentence in bare(text):
        if len(" ".join([*taken, sentence]).split()) > most:
            break
        taken.append(sentence)
    return " ".join(taken) or " ".join(bare(text)[0].split()[:most]).rstrip(",;:") + "."


def _has_items(text: str) -> bool:
    return any(_ITEM.match(line) for line in text.splitlines())


def _all_items(text: str) -> bool:
    return all(line.startswith("- ") for line in text.splitlines())


def _spell(number: re.Match[str]) -> str:
    value = number[0]
    small = value.isascii() and len(value) < 3 and int(value) < len(_NUMBERS)
    return _NUMBERS[int(value)] if small else "many"


def _without_numbers(text: str) -> str:
    lines = (re.sub(r"^(\s*)\d+[.)]\s", r"\1- ", line) for line in text.splitlines())
    return re.sub(r"\d+", _spell, "\n".join(lines))


def _in_short_sentences(text: str) -> str:
    parts = []
    for sentence in bare(text):
        words = sentence.split()
        while len(words) > _LONGEST:
            commas = [at for at, word in enumerate(words[:_LONGEST], 1) if word.endswith(",")]
            cut = commas[-1] if commas else _LONGEST
            parts.append(" ".join(words[:cut]).rstrip(",;:") + ".")
            words = words[cut:]
            words[0] = words[0][:1].upper() + words[0][1:]
        parts.append(" ".join(words))
    return " ".join(parts)


_LONGEST = 15


def _has_short_sentences(text: str) -> bool:
    return all(len(sentence.split()) <= _LONGEST for sentence in list_sentences(text))


def _expand(text: str) -> str:
    plain = re.sub("’", "'", text)
    plain = re.sub(r"\b(ca)n't", r"\1nnot", plain, flags=re.IGNORECASE)
    plain = re.sub(r"\bwon't", "will not", plain, flags=re.IGNORECASE)
    plain = _CONTRACTION.sub(lambda match: _CONTRACTIONS[match[0].casefold()], plain)
    # Odd quotation marks may have come together to one more.
    return _CONTRACTION.sub(" ", plain)


def _contains(*words: str) -> Callable[[str], bool]:
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
    return lambda text: pattern.search(text) is not None


def _with_bold(text: str) -> str:
    words = text.replace("*", "").split()
    return f"**{words[0]}** {' '.join(words[1:])}".strip() if words else f"**{NOTHING}**"


def _begins(text: str) -> Callable[[str], bool]:
    return lambda answer: answer.startswith(text)


def _ends(text: str) -> Callable[[str], bool]:
    return lambda answer: answer.endswith(text)


def _last_line_begins(text: str) -> Callable[[str], bool]:
    return lambda answer: answer.splitlines()[-1].startswith(text)


WISHES: Final[tuple[Wish, ...]] = (
    Wish(
        "short",
        "length",
        "at most forty words",
        lambda text: len(text.split()) <= 40,
        lambda text: _first_words(text, 40),
    ),
    Wish(
        "two_sentences",
        "length",
        "at most two sentences",
        lambda text: len(list_sentences(text)) <= 2,
        lambda text: " ".join(bare(text)[:2]),
    ),
    Wish(
        "short_sentences",
        "length",
        f"no sentence of more than {_LONGEST} words",
        _has_short_sentences,
        _in_short_sentences,
    ),
    Wish(
        "one_paragraph",
        "structure",
        "one paragraph, without a line break",
        lambda text: len(text.splitlines()) == 1,
        lambda text: " ".join(bare(text)),
    ),
    Wish(
        "no_list",
        "structure",
        "no list",
        lambda text: not _has_items(text),
        lambda text: " ".join(bare(text)),
    ),
    Wish(
        "bullets",
        "structure",
        "every line is an item that begins with a dash",
        _all_items,
        lambda text: "\n".join(f"- {sentence}" for sentence in bare(text)),
    ),
    Wish(
        "heading",
        "form",
        "a heading in the first line",
        lambda text: text.startswith("# ") and len(text.splitlines()) > 1,
        lambda text: f"# {' '.join(bare(text)[0].split()[:5]).rstrip('.,;:')}\n\n{text}",
    ),
    Wish(
        "labelled",
        "form",
        'begins with "Answer:"',
        _begins("Answer: "),
        lambda text: f"Answer: {text}",
    ),
    Wish(
        "bold",
        "form",
        "something is in bold",
        lambda text: re.search(r"\*\*[^*\n]+\*\*", text) is not None,
        _with_bold,
    ),
    Wish(
        "finished",
        "ending",
        "the last sentence is a whole one",
        lambda text: re.search(r"[.!?…][\"')\]*]*$", text) is not None,
        lambda text: f"{text.rstrip(',;:')}.",
    ),
    Wish(
        "in_short",
        "ending",
        'the last line says it again, after "In short:"',
        _last_line_begins("In short: "),
        lambda text: f"{text}\n\nIn short: {_first_words(text, 12)}",
    ),
    Wish(
        "asks_back",
        "ending",
        "ends with a question to the reader",
        _ends("?"),
        lambda text: f"{text} Would you like to know more?",
    ),
    Wish(
        "glad",
        "ending",
        'ends with "Glad to help!"',
        _ends("Glad to help!"),
        lambda text: f"{text} Glad to help!",
    ),
    Wish(
        "addressed",
        "wording",
        'speaks to the reader: "you" or "your"',
        _contains("you", "your", "yours", "yourself"),
        lambda text: f"{text} I hope this helps you.",
    ),
    Wish(
        "careful",
        "wording",
        'leaves room: "usually", "often", "may", "might" and the like',
        _contains("usually", "often", "may", "might", "typically", "generally", "sometimes"),
        lambda text: f"{text} This may differ from case to case.",
    ),
    Wish(
        "example",
        "wording",
        "gives an example",
        _contains("for example", "for instance", "such as", r"e\.g"),
        lambda text: f"{text} You meet it every day, for example at home.",
    ),
    Wish(
        "no_digits",
        "wording",
        "no digits",
        lambda text: re.search(r"\d", text) is None,
        _without_numbers,
    ),
    Wish(
        "no_contractions",
        "wording",
        "no contractions",
        lambda text: _CONTRACTION.search(text.replace("’", "'")) is None,
        _expand,
    ),
)
BY_NAME: Final = {wish.name: wish for wish in WISHES}

# How often the base meets them, greedily, in all 172 held-out prompts (SmolLM2-135M-Instruct, by
# transformers, 192 tokens at most, 36 % of the answers cut off there): short 25 %, one_paragraph
# 53 %, careful 27 %, addressed 22 %; bullets, in_short and glad never. The engine's own figures
# (`--base-rates`) take their place when they are there.
REPORTED: Final = ("short", "one_paragraph", "careful", "bullets", "in_short")
TUNING: Final = ("addressed", "glad")
