"""What happens to every request before its route, and to every reply after it; pure ASGI.

Owns: the id and the headers of each, the reply to a fault that no handler renders, the limits of a
key, the count of replies. Completions, which people wait for, do all of it themselves
(`endpoints/chat.py`). Does not own: the order (`app.py`).
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.errors import AppError, RateLimited
from server.access.limits import Account
from server.chat.relay import ALWAYS
from server.errors import describe_error, envelope_of, headers_of
from server.gateway import Gateway
from server.http import request_ids
from server.metrics import OTHER, Figures


class IdentifyRequests:
    """Gives each request its id, and each reply that and the headers that all have.

    uvicorn runs each request in a task of its own, so nothing has to be put back at the end. A
    fault that no handler renders becomes a reply here and not further out, where it would be
    neither counted nor readable for other origins.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = (*ALWAYS, (request_ids.HEADER, request_ids.identify(scope).encode("ascii")))
        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                given = message["headers"]
                names = {name for name, _ in given}
                message["headers"] = [*given, *(pair for pair in headers if pair[0] not in names)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if has_begun:
                raise
            status, envelope, more = describe_error(error)
            reply = JSONResponse(envelope, status, headers=more)
            await reply(scope, receive, send_with_headers)


class LimitRequests:
    """Applies the limits of a request's key before its route runs.

    Completions, which alone use tokens, do so themselves (`endpoints/chat.py`).
    A request without a key in force passes: its route says what is wrong with it.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = self._find_account(scope) if scope["type"] == "http" else None
        if account is None:
            await self._app(scope, receive, send)
            return
        try:
            admission = account.admit(with_tokens=False)
        except RateLimited as error:
            headers = {**account.headers(), **headers_of(error)}
            reply = JSONResponse(envelope_of(error), error.status, headers=headers)
            await reply(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(account.headers())
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            admission.end()

    def _find_account(self, scope: Scope) -> Account | None:
        authorization = Headers(scope=scope).get("authorization")
        if authorization is None:
            return None
        try:
            key = self._gateway.directory.keyring.authenticate(authorization)
        except AppError:
            return None
        return self._gateway.limits.account(key)


class CountRequests:
    """Counts replies by the template of their route."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app = app
        self._requests = figures.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # None before a route was found: an unknown path, or a limit that was reached
                path = getattr(scope.get("route"), "path", OTHER)
                self._requests.of(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)
