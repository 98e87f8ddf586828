"""The load of `benchmarks/gateway.py`: a process of its own that asks one server and times it.

`python -P benchmarks/peers/load.py --url http://127.0.0.1:8000 --model assistant --clients 16`

Closed loop by default: each client asks, waits for the end, asks again. With `--rate` the loop is
open: requests begin at fixed times, and a request's latency counts from its intended start, however
late it was sent. Raw sockets and httptools: the load shares the machine with what it measures.
Bounded by `--seconds` and `--requests`; what has begun is waited for. Loopback only. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

DONE = b"data: [DONE]\n\n"
QUESTION = (
    "Number %09d. A river carries water from the mountains to the sea. Please say in a few plain "
    "sentences why rivers bend, and what that means for the towns and the fields beside them."
)
LONGEST_WAIT_SECONDS = 60.0


class Client(asyncio.Protocol):
    """One kept connection; one request at a time."""

    transport: asyncio.Transport

    def __init__(self, stream: bool, on_end: Callable[[Client], None]) -> None:
        self.began = 0.0  #: when the request was meant to begin
        self.first = 0.0  #: when its first byte of a body came
        self.ended = 0.0
        self.failure: str | None = None
        self.lost = False  #: the server has closed it
        self._stream = stream
        self._on_end = on_end
        self._asks = False
        self._asked = 0
        self._request = b""
        self._heard = False
        self._tail = b""
        self._parser: Any = None

    def ask(self, request: bytes, began: float) -> None:
        self.began, self.first, self._tail = began, 0.0, b""
        self.failure, self._asks, self._heard = None, True, False
        self._request = request
        self._asked += 1
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self.first:
            self.first = time.perf_counter()
        self._tail = (self._tail + body)[-len(DONE) :] if self._stream else body[:200]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"{status} {self._tail[:200]!r}")
        elif self._stream and self._tail != DONE:
            self._end(f"the stream ended with {self._tail!r}")
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._asks:
            self._end(f"the connection broke: {exc}")

    @property
    def unheard(self) -> bytes | None:
        """The request that met the end of a kept connection: the server hasn't seen it."""
        return self._request if self.lost and self._asked > 1 and not self._heard else None

    def _end(self, failure: str | None) -> None:
        self.ended, self.failure, self._asks = time.perf_counter(), failure, False
        self._on_end(self)


class Load:
    """What is asked, and what was seen."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        address = urlsplit(options.url)
        if address.hostname not in ("127.0.0.1", "localhost"):
            raise SystemExit("this load is for loopback only")
        self._host, self._port = address.hostname, address.port or 80
        body: dict[str, Any] = {
            "model": options.model,
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0.7,
        }
        if options.stream:
            body["stream"] = True
        self._body = json.dumps(body).encode()
        length = len(self._body % 0)
        self._head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
            f"authorization: Bearer {options.key}\r\ncontent-type: application/json\r\n"
            f"accept: */*\r\nuser-agent: load\r\ncontent-length: {length}\r\n\r\n"
        ).encode()
        self.begun = 0
        self.latencies: list[float] = []
        self.first: list[float] = []
        self.failures: list[str] = []
        self._idle: list[Client] = []
        self._again: set[asyncio.Future[None]] = set()
        self._all_ended = asyncio.Event()
        self._running = 0
        self._deadline = 0.0

    async def run(self) -> dict[str, Any]:
        options = self._options
        clients = [await self._connect() for _ in range(options.clients)]
        began = time.perf_counter()
        self._deadline = began + options.seconds
        if options.rate is None:
            for client in clients:
                self._ask(client, time.perf_counter())
        else:
            self._idle += clients
            await self._ask_at_times(began)
        async with asyncio.timeout(options.seconds + LONGEST_WAIT_SECONDS):
            while self._running:
                self._all_ended.clear()
                await self._all_ended.wait()
        seconds = time.perf_counter() - began
        for client in [*clients, *self._idle]:
            client.transport.close()
        return {
            "ends": len(self.latencies),
            "failures": len(self.failures),
            "failure": self.failures[0] if self.failures else None,
            "seconds": seconds,
            "per_second": len(self.latencies) / seconds,
            "p50_ms": quantile(self.latencies, 0.5) * 1000,
            "p95_ms": quantile(self.latencies, 0.95) * 1000,
            "p99_ms": quantile(self.latencies, 0.99) * 1000,
            "first_p50_ms": quantile(self.first, 0.5) * 1000,
            "first_p99_ms": quantile(self.first, 0.99) * 1000,
        }

    async def _ask_at_times(self, began: float) -> None:
        for number in range(min(self._options.requests, int(self._deadline_in() * self._rate()))):
            intended = began + number / self._rate()
            wait = intended - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            self._ask(await self._free_client(), intended)

    async def _free_client(self) -> Client:
        """One that the server hasn't closed for being idle, or a new one."""
        while self._idle:
            client = self._idle.pop()
            if not client.lost and not client.transport.is_closing():
                return client
        return await self._connect()

    def _rate(self) -> float:
        return float(self._options.rate)

    def _deadline_in(self) -> float:
        return float(self._options.seconds)

    async def _connect(self) -> Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(
            lambda: Client(self._options.stream, self._ended), self._host, self._port
        )
        return client

    def _ask(self, client: Client, began: float) -> None:
        number = self._options.first + self.begun
        self.begun += 1
        self._running += 1
        client.ask(self._head + self._body % number, began)

    async def _ask_again(self, request: bytes, began: float) -> None:
        """As clients do: once more on a new connection, which counts from the first time."""
        try:
            client = await self._connect()
        except OSError as error:
            self._running -= 1
            self.failures.append(f"no connection: {error}")
            if not self._running:
                self._all_ended.set()
        else:
            client.ask(request, began)

    def _ended(self, client: Client) -> None:
        if (request := client.unheard) is not None:
            again = asyncio.ensure_future(self._ask_again(request, client.began))
            self._again.add(again)
            again.add_done_callback(self._again.discard)
            return
        self._running -= 1
        if client.failure is None:
            self.latencies.append(client.ended - client.began)
            self.first.append(client.first - client.began)
        else:
            self.failures.append(client.failure)
        goes_on = not client.transport.is_closing() and len(self.failures) < 100
        if self._options.rate is not None:
            if goes_on:
                self._idle.append(client)
        elif (
            goes_on and self.begun < self._options.requests and time.perf_counter() < self._deadline
        ):
            self._ask(client, time.perf_counter())
        if not self._running:
            self._all_ended.set()


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--key", default="none")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, help="requests/s, in an open loop")
    parser.add_argument("--first", type=int, default=0, help="number of the first question")
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()

    async def run() -> dict[str, Any]:
        return await Load(options).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.write(json.dumps(runner.run(run())) + "\n")


if __name__ == "__main__":
    main()
