"""Renders every error as OpenAI's envelope `{"error": {"message", "type", "param", "code"}}`.

Owns: the handlers and the mapping of an engine's own errors. Does not own the errors themselves
(`feedback/errors.py`); no stack trace and no validation internals leave the process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from feedback.errors import AppError, BadRequest, Conflict, NotReady, RateLimited
from server.elsewhere import find_advice
from server.terminal import printable

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


class EngineFault(AppError):
    """The engine failed or refused; its own status and words where they help the caller."""

    type = "server_error"
    code = "engine_error"

    def __init__(self, message: str, *, status: int = 502, code: str = "engine_error") -> None:
        super().__init__(message, code=code)
        self.status = status
        self.type = _TYPES.get(status, "server_error")


class UnsupportedEncoding(BadRequest):
    """A body in an encoding, or in several, that is not undone here."""

    status = 415

    def __init__(self, found: str, accepted: Sequence[str]) -> None:
        self.accepted = ", ".join(accepted)
        super().__init__(
            f"the body has the content-encoding {found[:80]!r}; send one of {self.accepted}, or "
            "the body as it is",
            code="unsupported_encoding",
        )


class NotLoaded(NotReady):
    """The engine has forgotten a name that was loaded: its process is another than it was."""

    code = "not_loaded"


class StillRunning(Conflict):
    """The first request with this `Idempotency-Key` has not ended yet."""

    code = "idempotency_running"
    retry_after_seconds = 1


class IntegrityFault(AppError):
    """The engine answered under another name than it was asked for: nothing of it is passed on."""

    status = 502
    code = "integrity_error"


def envelope(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object; what it repeats of a caller's words is made `printable`."""
    param = None if param is None else printable(param)
    return {"error": {"message": printable(message), "type": type, "param": param, "code": code}}


UNLIMITED = ("max_tokens", "max_completion_tokens")


def describe_field(problem: Mapping[str, Any], field: str) -> str:
    """What pydantic found wrong with `field`, and a way out where people are known to need one."""
    if field.rpartition(".")[2] in UNLIMITED and problem["type"] == "greater_than_equal":
        return f"{problem['msg']}; leave it out for no limit"
    return str(problem["msg"])


def envelope_of(error: AppError) -> dict[str, dict[str, str | None]]:
    return envelope(error.message, type=error.type, param=error.param, code=error.code)


def headers_of(error: AppError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, NotReady | RateLimited | StillRunning):
        return {"retry-after": str(error.retry_after_seconds)}
    if isinstance(error, UnsupportedEncoding):
        return {"accept-encoding": error.accepted}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


def event_of(error: AppError) -> bytes:
    """The error as the last event of a stream."""
    return b"data: " + json.dumps(envelope_of(error), separators=(",", ":")).encode() + b"\n\n"


def fault_of_engine(status: int, body: bytes, *, names: Mapping[str, str]) -> AppError:
    """Translate an engine's error reply into an `AppError`.

    `names` maps the engine's names in its message to public ones.
    """
    try:
        found = json.loads(body)["error"]
        message, param = str(found["message"]), found.get("param")
    except (ValueError, KeyError, TypeError, RecursionError):
        message, param = "the engine gave no reason", None
    for engine_name, public in names.items():
        message = message.replace(engine_name, public)
    if status == 404:
        return NotLoaded("the engine does not have the release loaded yet; try again")
    if status in (400, 413, 422):  # the caller's doing, in the engine's words
        too_long = "maximum context length" in message
        return BadRequest(
            message,
            param=param if isinstance(param, str) else None,
            # OpenAI's code, by which callers know that they have to shorten the conversation.
            code="context_length_exceeded" if too_long else None,
        )
    return EngineFault(f"the engine failed: {message}")  # its 401 and 429 mean the gateway


_UNKNOWN = envelope("internal error; the log has it", type="server_error", code="internal_error")
"""What is told of a fault that nobody foresaw."""


def describe_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, envelope and headers for whatever ended a request; what is ours is logged."""
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
        logger.error(
            "Database unavailable", extra={"action": "database_unavailable"}, exc_info=error
        )
        error = NotReady(
            "the database cannot be used right now; try again", code="database_unavailable"
        )
    if isinstance(error, AppError):
        return error.status, envelope_of(error), headers_of(error)
    logger.error("Request failed", extra={"action": "request_failed"}, exc_info=error)
    return 500, _UNKNOWN, {}


def _list_methods(request: Request) -> list[str]:
    """What the path of a request may be asked with: all routes of the template that it fits first.

    Starlette names the methods of one route.
    """
    fits = (route.path for route in _routes_of(request, request.url.path))
    template = next(fits, None)
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = {m for route in routes if route.path == template for m in route.methods or ()}
    return sorted({*found, "OPTIONS", *(("HEAD",) if "GET" in found else ())})


def _routes_of(request: Request, path: str) -> Iterator[Route]:
    """Routes that `path` fits, whatever their method."""
    scope = {**request.scope, "path": path}
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
            yield route


def _explain_missing(request: Request) -> str:
    """Which path was asked for in vain, and what may have been meant."""
    path = request.url.path
    advice = find_advice(
        path,
        f"{request.url.scheme}://{request.url.netloc[:200]}",
        lambda other: any(_routes_of(request, other)),
    )
    missing = f"no such path: {request.method} {path[:200]}"
    return missing if advice is None else f"{missing}; {advice}"


def add_error_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail, in one envelope."""

    def render(status: int, body: Any, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(body, status, headers=dict(headers or {}))

    async def on_error(_request: Request, error: Exception) -> JSONResponse:
        return render(*describe_error(error))

    async def on_validation_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [
            str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")
        ]
        param = ".".join(where) or None
        message = f"{param}: {describe_field(first, param)}" if param else str(first["msg"])
        return render(400, envelope(message, type="invalid_request_error", param=param))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = _explain_missing(request)
        headers = error.headers
        if error.status_code == 405:
            headers = {"allow": ", ".join(_list_methods(request))}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        kind = _TYPES.get(error.status_code, "server_error")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return render(error.status_code, envelope(message, type=kind, code=code), headers)

    async def on_broken_reply(request: Request, error: Exception) -> JSONResponse:
        # Its message has the reply's values, which may be what people wrote.
        assert isinstance(error, ResponseValidationError)
        faults = [(".".join(map(str, f["loc"][1:2])), f["type"]) for f in error.errors()]
        where = sorted({f"{place}: {kind}" for place, kind in faults})
        logger.error(
            "Reply is not of its own form",
            extra={"action": "reply_broken", "route": request.scope["route"].path, "where": where},
        )
        return render(500, _UNKNOWN)

    for fault in (AppError, OperationalError, InterfaceError, PoolTimeout, Exception):
        app.add_exception_handler(fault, on_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(ResponseValidationError, on_broken_reply)
    app.add_exception_handler(HTTPException, on_http_exception)
