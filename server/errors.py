"""Renders every error as OpenAI's envelope `{"error": {"message", "type", "param", "code"}}`.

Owns: the handlers and the mapping of an engine's own errors. Does not own the errors themselves
(`feedback/errors.py`); no stack trace and no validation internals leave the process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from feedback.errors import AppError, BadRequest, Conflict, NotReady, RateLimited

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
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
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def envelope_of(error: AppError) -> dict[str, dict[str, str | None]]:
    return envelope(error.message, type=error.type, param=error.param, code=error.code)


def headers_of(error: AppError) -> dict[str, str]:
    """Headers that go with an error."""
    if isinstance(error, NotReady | RateLimited | StillRunning):
        return {"retry-after": str(error.retry_after_seconds)}
    return {"www-authenticate": "Bearer"} if error.status == 401 else {}


def event_of(error: AppError) -> bytes:
    """The error as the last event of a stream."""
    return b"data: " + json.dumps(envelope_of(error), separators=(",", ":")).encode() + b"\n\n"


def fault_of_engine(status: int, body: bytes, *, names: Mapping[str, str]) -> AppError:
    """The engine's error reply as ours;

    `names` replaces engine names in its message by public ones.
    """
    try:
        found = json.loads(body)["error"]
        message, param = str(found["message"]), found.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = "the engine gave no reason", None
    for engine_name, public in names.items():
        message = message.replace(engine_name, public)
    if status == 404:
        return NotLoaded("the engine does not have the release loaded yet; try again")
    if status in (400, 413, 422):  # the caller's doing, in the engine's words
        return BadRequest(message, param=param if isinstance(param, str) else None)
    return EngineFault(f"the engine failed: {message}")  # its 401 and 429 mean the gateway


def add_error_handlers(app: FastAPI) -> None:
    """Every way in which a request can fail, in one envelope."""

    def render(status: int, body: Any, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(body, status, headers=dict(headers or {}))

    async def on_app_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AppError)
        return render(error.status, envelope_of(error), headers_of(error))

    async def on_validation_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = [
            str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")
        ]
        param = ".".join(where) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return render(400, envelope(message, type="invalid_request_error", param=param))

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no such path: {request.method} {request.url.path}"
        kind = _TYPES.get(error.status_code, "server_error")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return render(error.status_code, envelope(message, type=kind, code=code), error.headers)

    async def on_database_error(_request: Request, error: Exception) -> JSONResponse:
        logger.error(
            "Database unavailable", extra={"action": "database_unavailable"}, exc_info=error
        )
        busy = NotReady(
            "the database cannot be used right now; try again", code="database_unavailable"
        )
        return render(busy.status, envelope_of(busy), headers_of(busy))

    async def on_anything(_request: Request, error: Exception) -> JSONResponse:
        logger.error("Request failed", extra={"action": "request_failed"}, exc_info=error)
        return render(
            500,
            envelope("internal error; the log has it", type="server_error", code="internal_error"),
        )

    app.add_exception_handler(AppError, on_app_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(OperationalError, on_database_error)
    app.add_exception_handler(InterfaceError, on_database_error)
    app.add_exception_handler(PoolTimeout, on_database_error)
    app.add_exception_handler(Exception, on_anything)
