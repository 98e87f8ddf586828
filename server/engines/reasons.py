"""Why an engine does not answer, as it may be told without a key.

Owns: taking places out of an engine's own words and cutting them. Does not own: the full words,
which are in the log.
"""

from __future__ import annotations

import re

MOST_REASON_CHARACTERS = 200
_MOST_READ = 600  #: of an engine's words: the search for places takes the square of it

_PAGE = re.compile(r"<(?:!doctype|html|head|body)\b", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)
_PLACE = re.compile(
    r"\w+://\S+"  # addresses
    r"|\[[0-9a-fA-F:.]+\](:\d+)?|\d+(\.\d+){3}(:\d+)?"
    r"|[\w.-]+:\d{2,5}\b"
    r"|(?<![\w.-])[\w-]+(?:\.[\w-]+)*\.(?:internal|intranet|local|localdomain|lan|corp|home|svc)\b"
    r"|(?<![\w.-])(?:[a-zA-Z0-9-]+\.){2,}[a-zA-Z]{2,}(?![\w.-])"
    r"|(?<![\w/.])[~.]{0,2}/(?!v1/)[\w.@%+~-]+(?:/[\w.@%+~-]*)+"  # paths of files, not of our API
    r"|\b[a-zA-Z]:\\\S+"
)


def in_public(words: str) -> str:
    """`words` in few characters, without addresses, paths of files and proxies' pages."""
    words = words[:_MOST_READ]
    if _PAGE.search(words):
        title = _TITLE.search(words)
        words = f"a page of HTML ({title[1].strip()})" if title else "a page of HTML"
    words = _PLACE.sub("…", " ".join(words.split()))
    return words if len(words) <= MOST_REASON_CHARACTERS else words[:MOST_REASON_CHARACTERS] + "…"
