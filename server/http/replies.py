"""What every reply has, on every route: its id, two headers, its key's limits, its count.

Owns: the one place in which a reply begins. Does not own: what a route answers, the words of errors
(`errors.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from starlette.types import Send

from server.access.limits import Account
from server.errors import describe_error
from server.http.request_ids import HEADER
from server.metrics import OTHER, Figures

IGNORED_HEADER = "x-burnish-ignored"

_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Reply:
    """What goes back to the client: ASGI's messages, with what every reply has.

    `headers` are more of them, by name; `route` is the template by which it is counted.
    """

    __slots__ = ("_account", "_figures", "_request_id", "_send", "headers", "route", "status")

    def __init__(
        self, send: Send, request_id: str, figures: Figures, *, route: str = OTHER
    ) -> None:
        self._send = send
        self._request_id = request_id
        self._figures = figures
        self._account: Account | None = None
        self.headers: dict[str, str] = {}
        self.route = route
        self.status: int | None = None

    @property
    def begun(self) -> bool:
        return self.status is not None

    def limited_by(self, account: Account) -> None:
        """Tell the client what is left of its limits."""
        self._account = account

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Status and headers, by name."""
        await self.pass_start(status, _raw(headers))

    async def pass_start(self, status: int, given: Iterable[tuple[bytes, bytes]]) -> None:
        """Status and headers as ASGI has them; of those that every reply has, given ones stand."""
        self.status = status
        self._figures.requests.of(self.route, str(status)).inc()
        raw = [*_raw(self.headers), *given]
        if self._account is not None:
            raw += _raw(self._account.headers())
        names = [name for name, _ in raw]
        every = (*_ALWAYS, (HEADER, self._request_id.encode("ascii")))
        raw += [pair for pair in every if pair[0] not in names]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, body: bytes, *, more: bool = False) -> None:
        """A piece of the body; the last one without `more`."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def fail(self, error: Exception) -> None:
        """The whole reply: an error."""
        status, envelope, headers = describe_error(error)
        body = json.dumps(envelope).encode()
        await self.start(
            status,
            {**headers, "content-type": "application/json", "content-length": str(len(body))},
        )
        await self.send(body)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
