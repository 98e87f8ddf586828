"""What happens to every request before its route, and to every reply after it; pure ASGI.

Completions, which people wait for, do the same themselves (`endpoints/chat.py`), by the same
`Reply`. Does not own: what a reply has (`http/replies.py`), the order (`app.py`).
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.errors import AppError
from server.access.limits import Account, Admission
from server.gateway import Gateway
from server.http.replies import Reply
from server.http.request_ids import identify
from server.metrics import OTHER


class CompleteReplies:
    """Gives each request its id, applies its key's limits, completes and counts its reply.

    uvicorn runs each request in a task of its own, so nothing has to be put back at the end. A
    fault that no handler renders becomes a reply here and not further out, where it would be
    neither counted nor readable for other origins.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = Reply(send, identify(scope), self._gateway.figures)
        admission: Admission | None = None

        async def send_completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.route = _template(scope)
                await reply.pass_start(message["status"], message["headers"])
            else:
                await send(message)

        try:
            account = self._find_account(scope)
            if account is not None:
                reply.limited_by(account)
                admission = account.admit(with_tokens=False)
            await self._app(scope, receive, send_completed)
        except Exception as error:
            if reply.begun:
                raise
            reply.route = _template(scope)
            await reply.fail(error)
        finally:
            if admission is not None:
                admission.end()

    def _find_account(self, scope: Scope) -> Account | None:
        """None for a request without a key in force: its route says what is wrong with it."""
        try:
            key = self._gateway.callers.authenticate(scope)
        except AppError:
            return None
        return self._gateway.limits.account(key)


def _template(scope: Scope) -> str:
    """The path of the route, as long as none was found (an unknown path, a limit) `other`."""
    template: str = getattr(scope.get("route"), "path", OTHER)
    return template
