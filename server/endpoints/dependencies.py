"""What a route's function asks for: its caller, and a transaction.

Owns: the dependencies of all routes but chat. A write transaction commits before the reply is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from feedback.errors import BadRequest, NotFound
from server.access.keyring import Caller
from server.gateway import Gateway


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayDep = Annotated[Gateway, Depends(_gateway)]


async def _caller(request: Request, gateway: GatewayDep) -> Caller:
    """The caller, as the key's own person.

    Routes that let an application name an end user resolve that one themselves.
    """
    key = gateway.callers.authorize(request.scope, request.method, request.scope["route"].path)
    _refuse_nul(request)
    return await gateway.callers.caller(key, {}, request.headers)


def _refuse_nul(request: Request) -> None:
    """NUL names nothing: PostgreSQL does not take it even to look for it."""
    for value in request.path_params.values():
        if "\x00" in value:
            raise NotFound("no such path: it has a NUL")
    for name, value in request.query_params.multi_items():
        if "\x00" in name + value:
            raise BadRequest("a parameter has a NUL", param=name.replace("\x00", ""))


CallerDep = Annotated[Caller, Depends(_caller)]


def _read(gateway: GatewayDep, _caller: CallerDep) -> Iterator[Session]:
    with gateway.database.read() as session:
        yield session


def _write(gateway: GatewayDep, _caller: CallerDep) -> Iterator[Session]:
    with gateway.database.write() as session:
        yield session


ReadSession = Annotated[Session, Depends(_read, scope="function")]
WriteSession = Annotated[Session, Depends(_write, scope="function")]
