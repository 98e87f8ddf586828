"""The least that a gateway in Python does: a body goes to the engine, what comes back goes on.

`python -P benchmarks/peers/passthrough.py --port 8002 --engine http://127.0.0.1:8001`

Raw ASGI and aiohttp on uvicorn with uvloop and httptools, as Burnish's gateway has them, and
nothing else: no key, no check, no route, no record. What Burnish is measured against.
"""

from __future__ import annotations

import argparse
from typing import Any

import aiohttp
import uvicorn


class PassThrough:
    """An ASGI application that forwards every request to one engine."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        async with self._session.request(
            scope["method"], self._engine + scope["path"], data=body, headers=headers
        ) as reply:
            kept = [
                (name.lower().encode(), value.encode())
                for name, value in reply.headers.items()
                if name.lower() in ("content-type", "content-length")
            ]
            await send({"type": "http.response.start", "status": reply.status, "headers": kept})
            async for piece in reply.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> None:
    """Serve on 127.0.0.1 until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine", required=True)
    options = parser.parse_args()
    uvicorn.run(
        PassThrough(options.engine),
        host="127.0.0.1",
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
