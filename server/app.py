"""The FastAPI application of one gateway, and the process that serves it.

Owns: which routers and middlewares there are, how the process starts and ends.
Does not own: what the gateway consists of (`gateway.py`).
"""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from feedback.db import Database
from server import endpoints
from server.access.scopes import check_routes
from server.cluster.kept_lock import check_direct
from server.endpoints.chat import Completions
from server.endpoints.openapi import DescribedApi
from server.errors import add_error_handlers
from server.gateway import Gateway, build_gateway, running, sole_gateway
from server.http.bounds import Bounds
from server.http.encodings import Decoded, find_encoding
from server.http.idempotency import REPLAYED_HEADER
from server.http.replies import IGNORED_HEADER
from server.machine import allow_open_files, collect_garbage_rarely, installed_version
from server.middleware import CompleteReplies
from server.schema import check_schema
from server.settings import Settings
from tuner.base_models import BaseModel, describe_base

_EXPOSED = (
    "x-request-id",
    "x-burnish-release",
    "x-burnish-stored",
    IGNORED_HEADER,
    REPLAYED_HEADER,
    "retry-after",
    *(
        f"x-ratelimit-{what}-{of}"
        for of in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)
"""Headers that scripts of other origins may read."""

_OTHER_FILES = 256  #: open files beside connections: the database, uploads, logs
_SLASHES = re.compile("/{2,}")
logger = logging.getLogger(__name__)


def create_app(gateway: Gateway) -> FastAPI:
    """All routes over `gateway`. Raises RuntimeError where a route has no scope."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with running(gateway):
            yield

    app = Application(
        title="Burnish",
        description="An OpenAI-compatible chat service that is polished by its users.",
        version=installed_version("burnish") or "0",
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # the address it would give is not the one that was asked
        separate_input_output_schemas=False,
    )
    app.state.gateway = gateway
    add_error_handlers(app)
    for router in endpoints.ROUTERS:
        # As they are: FastAPI would make each route again, a quarter of a second for all of them.
        app.router.routes += router.routes
    check_routes(app.routes)
    # The last one added is the outermost: a refusal has the headers of every reply too.
    app.add_middleware(CompleteReplies, gateway=gateway)
    app.completions = Completions(gateway)
    if origins := gateway.settings.gateway.cors_origins:
        sharing: dict[str, Any] = {
            "allow_origins": origins,
            "allow_methods": ["GET", "POST", "PATCH", "DELETE"],
            "allow_headers": ["*"],  # clients send headers of their own; keys are no cookies
            "expose_headers": _EXPOSED,
        }
        app.add_middleware(CORSMiddleware, **sharing)
        app.completions = CORSMiddleware(app.completions, **sharing)
    return app


class Application(DescribedApi):
    """FastAPI, except for the two routes that people wait for."""

    completions: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = as_asked(scope)
            encoding = find_encoding(scope)
            if encoding is not None:
                receive = Decoded(receive, encoding)
        if Completions.answers(scope):
            await self.completions(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def as_asked(scope: Scope) -> Scope:
    """The request that is meant: HEAD asks as GET does, and a slash too many means nothing.

    The server leaves out the body of the reply to a HEAD by itself.
    """
    path = scope["path"]
    if "//" in path or (path[-1:] == "/" and len(path) > 1):
        scope = {**scope, "path": _SLASHES.sub("/", path).rstrip("/") or "/"}
    if scope["method"] == "HEAD":
        scope = {**scope, "method": "GET"}
    return scope


class GatewayServer(uvicorn.Server):
    """uvicorn, telling the gateway first that it ends: readiness fails before connections do.

    A signal that was obeyed is not raised again at the end, so the exit status is 0.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT  # asked twice by a person
        self.should_exit = True
        self._gateway.stopping = True


def serve(settings: Settings) -> int:
    """Run one gateway until SIGTERM or SIGINT; the exit status.

    Raises DatabaseUnfit where another gateway has the SQLite file, the schema is of another version
    or a pooler stands in the way, and BaseModelError.
    """
    base, database = read_base(settings), _open_database(settings)
    try:
        check_schema(database)
        check_direct(database)
        gateway = build_gateway(settings, base, database)
        server = GatewayServer(build_config(create_app(gateway), settings), gateway)
        collect_garbage_rarely()
        _allow_connections(settings.gateway.max_connections)
        with sole_gateway(database):
            server.run()
    finally:
        database.dispose()
    return 0 if server.started else 1


def _open_database(settings: Settings) -> Database:
    return Database(settings.database_url, direct_url=settings.database.direct_url)


def _allow_connections(most: int) -> None:
    """Each may need one of its own to an engine."""
    wanted = 2 * most + _OTHER_FILES
    allowed = allow_open_files(wanted)
    if allowed < wanted:
        logger.warning(
            "%s open files are allowed, and gateway.max_connections = %s needs %s: raise `ulimit "
            "-n`, or lower it",
            allowed,
            most,
            wanted,
            extra={"action": "open_files_few"},
        )


def build_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    proxies = settings.gateway.forwarded_allow_ips
    gateway: Gateway = app.state.gateway
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Bounds(settings.gateway, gateway.figures.connections_ended).protocol(),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
        timeout_graceful_shutdown=max(1, int(settings.gateway.drain_timeout_seconds)),
    )


def read_base(settings: Settings) -> BaseModel:
    """The base that the engines serve. Raises BaseModelError."""
    return describe_base(
        settings.model_dir,
        settings.base_name,
        settings.model.revision,
        cache=settings.data / "models" / "revisions.json",
    )
