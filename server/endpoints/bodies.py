"""Bodies of all routes but chat: how they are read, and what holds for each of them.

Owns: that nothing is read for a caller who may not call, that no body passes the limit, that
unknown keys are errors, that nothing comes in that a database cannot store, and that a request with
an `Idempotency-Key` runs once. Does not own: what a route's body says.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ConfigDict, model_validator
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from feedback.db import Database
from feedback.errors import BadRequest
from feedback.numbers import WholeNumbers
from server.access.keyring import KeyView
from server.gateway import Gateway
from server.http import idempotency
from server.http.bodies import MAX_PARTS, parse_body, read_body
from server.http.idempotency import Attempt
from server.settings import Settings

WORKER_BODY_BYTES = 16 * 1024 * 1024  #: a batch of the longest prompts that curation lets pass


logger = logging.getLogger(__name__)


Answering = Coroutine[Any, Any, Response]


Handler = Callable[[Request], Answering]


T = TypeVar("T")


class Part(WholeNumbers):
    """Base of the objects in request bodies: unknown keys are errors, and types are strict.

    The one conversion is that `8.0` is read as 8. Fields that are enumerations or tuples set
    `strict=False`, because JSON has neither.
    """

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Part):
    """A request's body."""

    @model_validator(mode="before")
    @classmethod
    def _is_storable(cls, value: Any) -> Any:
        waiting = [("", value)]
        while waiting:
            where, found = waiting.pop()
            if isinstance(found, str) and "\x00" in found:
                raise BadRequest(f"{where or 'the body'} has a NUL", param=where or None)
            if isinstance(found, dict):
                waiting += [("a key", key) for key in found]
                waiting += [(where or str(key)[:100], item) for key, item in found.items()]
            elif isinstance(found, list):
                waiting += [(where, item) for item in found]
        return value


class JsonRoute(APIRoute):
    """A route that reads its body itself, after the key was checked and up to a limit.

    FastAPI would read any amount from anybody first.
    """

    most_parts: ClassVar[int] = MAX_PARTS

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            gateway: Gateway = request.app.state.gateway
            key = gateway.callers.authorize(request.scope, request.method, self.path)
            raw = await read_body(request.receive, self.most_bytes(gateway.settings))
            read = _Read(request, raw, _parse(request, raw, self.most_parts))
            named = request.headers.get(idempotency.HEADER)
            if named is None or not idempotency.takes_key(request.method, self.path):
                return await handler(read)
            attempt = idempotency.build_attempt(
                _caller(key), named, request.method, request.url.path, raw
            )
            return await _run_once(gateway.database, attempt, lambda: _whole(handler, read))

        return handle

    def most_bytes(self, settings: Settings) -> int:
        """The largest body of this route."""
        return settings.gateway.max_body_bytes


class WorkerRoute(JsonRoute):
    """A route for our own worker, whose bodies are larger."""

    most_parts = 1_000_000

    def most_bytes(self, settings: Settings) -> int:
        return WORKER_BODY_BYTES


async def _whole(handler: Handler, request: Request) -> Response:
    """The route's reply, once its transaction has been committed.

    FastAPI ends dependencies of the scope `function` when the route's handler has returned: here
    that is too late, for the reply may be kept only after the work.
    """
    async with AsyncExitStack() as stack:
        request.scope["fastapi_function_astack"] = stack
        return await handler(request)


def _caller(key: KeyView) -> str:
    """Whose idempotency keys these are: those of one key, or of one feedback token's answer."""
    grant = key.grant
    return key.id if grant is None else f"{key.id}/{grant.answer_id}/{grant.person_id}"


async def _run_once(database: Database, attempt: Attempt, run: Callable[[], Answering]) -> Response:
    """Run a request unless it ran before; then its reply again."""

    def do(work: Callable[[Session, Attempt], T]) -> T:
        with database.write() as session:
            return work(session, attempt)

    kept = await asyncio.to_thread(do, idempotency.begin)
    if kept is not None:
        headers = {idempotency.REPLAYED_HEADER: "true"}
        return JSONResponse(kept.body, kept.status, headers=headers)
    beats = asyncio.create_task(_beat(lambda: do(idempotency.beat)))
    try:
        response = await run()
    except Exception:
        await asyncio.to_thread(do, idempotency.give_up)
        raise
    finally:
        beats.cancel()
    if not 200 <= response.status_code < 300:
        await asyncio.to_thread(do, idempotency.give_up)
        return response
    reply = idempotency.KeptReply(response.status_code, json.loads(bytes(response.body)))
    try:
        await asyncio.to_thread(do, lambda s, a: idempotency.keep(s, a, reply))
    except SQLAlchemyError:
        # The work is done and the caller must hear so; a copy of the request may run it again.
        logger.exception("Reply not kept", extra={"action": "idempotent_reply_lost"})
    return response


async def _beat(beat: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(idempotency.BEAT_SECONDS)
        try:
            await asyncio.to_thread(beat)
        except SQLAlchemyError:
            logger.warning("Beat missed", extra={"action": "idempotent_beat_missed"}, exc_info=True)


class _Read(Request):
    """A request whose body is in memory, parsed."""

    def __init__(self, request: Request, raw: bytes, parsed: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = raw  # where Starlette keeps it
        self._parsed = parsed

    async def json(self) -> Any:
        return self._parsed


def _parse(request: Request, raw: bytes, most_parts: int) -> Any:
    if not raw:
        return None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"the body is {kind or 'of no type'}; send content-type: application/json")
    return parse_body(raw, max_bytes=len(raw), max_parts=most_parts)
