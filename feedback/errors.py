"""Errors that reach a caller. Raised where the fact is known; `server/errors.py` renders them all.

A message says what was found, what was expected and what to do.
"""

from __future__ import annotations


class AppError(Exception):
    """Something to tell the caller, with the HTTP status that says it."""

    status: int = 500
    type: str = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(AppError):
    """The request cannot be understood or breaks a rule that the caller can follow."""

    status = 400
    type = "invalid_request_error"
    code = None


class NotAuthenticated(AppError):
    """No key, or one that is unknown or revoked."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(AppError):
    """The key lacks a scope."""

    status = 403
    type = "permission_error"
    code = "insufficient_scope"


class NotFound(AppError):
    """Unknown, or somebody else's: the two are not told apart."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(AppError):
    """The state is not what the request supposes."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class RateLimited(AppError):
    """A limit of the key is used up; `retry_after_seconds` is sent as `retry-after`."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TooLarge(AppError):
    """The body or a part of it passes a limit."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class NotReady(AppError):
    """Try again later; `retry_after_seconds` is sent as `retry-after`."""

    status = 503
    type = "service_unavailable"
    code = "not_ready"

    def __init__(
        self, message: str, *, code: str | None = None, retry_after_seconds: int = 5
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after_seconds = retry_after_seconds
