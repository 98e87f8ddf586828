"""Advice for paths of other APIs that clients ask for in vain: what to use or to set instead.

Owns: the sentences. Does not own: that such a request is 404 (`errors.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

_CHAT = "POST /v1/chat/completions"

_INSTEAD = (
    (
        r"/v1/responses\b|/v1/conversations\b",
        f"Burnish has no Responses API; use {_CHAT} (most SDKs have a setting or a client for "
        "chat completions)",
    ),
    (
        r"/v1/(assistants|threads)\b",
        f"Burnish has no Assistants API; use {_CHAT} and send the conversation with each request",
    ),
    (r"/v1/messages\b", f"this is Anthropic's API; Burnish has OpenAI's: use {_CHAT}"),
    (
        r"/api/(chat|generate|tags|embed|embeddings|show|version)\b",
        f"this is Ollama's API; Burnish has OpenAI's: set base_url to {{base}}/v1 and use {_CHAT}",
    ),
    (
        r"/openai/|/v1/engines/",
        f"the model is no part of the path here: set base_url to {{base}}/v1 and use {_CHAT}",
    ),
    (
        r"/v1/(embeddings|rerank|score|moderations|images|audio|realtime|videos)\b",
        f"Burnish serves a chat model and has no {{name}}; it has {_CHAT} and POST /v1/completions",
    ),
    (
        r"/v1/(batches|uploads|vector_stores|containers|evals)\b",
        "Burnish has no {name}; files are sent to POST /v1/files",
    ),
)
_INSTEAD_OF = tuple((re.compile(pattern), words) for pattern, words in _INSTEAD)
_ENDPOINT = re.compile(r"(/v1)?/(chat/)?completions(?=/.)")


def find_advice(path: str, base: str, exists: Callable[[str], bool]) -> str | None:
    """What to use instead of `path`, or how to set a client's `base_url`; None: nothing is known.

    `base` is the gateway's address as the caller wrote it, without a path; `exists` says whether
    there is a route for a path.
    """
    if path.startswith("/v1/v1/") or path == "/v1/v1":
        return f"the path has /v1 twice: set base_url to {base}/v1, without a second /v1"
    if exists(f"/v1{path}"):
        return f"the path lacks /v1: set base_url to {base}/v1"
    endpoint = _ENDPOINT.match(path)
    if endpoint is not None and exists("/v1" + path[endpoint.end() :].removeprefix("/v1")):
        return f"base_url ends with a route: set it to {base}/v1"
    rest = path[path.index("/v1/") :] if "/v1/" in path else ""
    if rest != path and exists(rest):
        return f"the gateway stands at the root of its host: set base_url to {base}/v1"
    for pattern, words in _INSTEAD_OF:
        if pattern.match(path):
            name = path.removeprefix("/v1/").partition("/")[0]
            return words.format(base=base, name=f"/v1/{name}")
    return None
