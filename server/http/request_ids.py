"""The id of a request, which its reply and its log lines carry.

For a completion it is the id of the answer too.

Owns: where it is made and kept. It is ours alone: a caller's own could repeat, or be another
answer's. What a caller sends as `X-Client-Request-Id` or `X-Request-Id` stands beside it in log
lines. Does not own: replies (`middleware.py`) or lines (`logs.py`).
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

from feedback.db import new_id

Scope = MutableMapping[str, Any]

HEADER = b"x-request-id"

_KEY = "burnish.request_id"
_CALLERS = (b"x-client-request-id", HEADER)
_CALLERS_FORM = re.compile(rb"[\x21-\x7e]{1,128}")
_REQUEST: ContextVar[Scope | None] = ContextVar("request", default=None)


def identify(scope: Scope) -> str:
    """Give a request its id, for the task that calls and all that it starts from then on."""
    number: str = new_id("")
    scope[_KEY] = number
    _REQUEST.set(scope)
    return number


def get_request_id() -> str:
    """The id of the request that is being handled. Raises LookupError where there is none."""
    scope = _REQUEST.get()
    if scope is None:
        raise LookupError("no request is being handled here")
    found: str = scope[_KEY]
    return found


def describe_request() -> dict[str, str]:
    """`request_id` and, where the caller sent a usable one, `caller_request_id`.

    Empty outside of requests.
    """
    scope = _REQUEST.get()
    if scope is None:
        return {}
    found = {"request_id": scope[_KEY]}
    for name in _CALLERS:
        value = next((value for key, value in scope["headers"] if key == name), b"")
        if _CALLERS_FORM.fullmatch(value):
            return {**found, "caller_request_id": value.decode("ascii")}
    return found
