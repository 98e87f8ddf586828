"""The fake engine: vLLM's paths over `Slots` and `Answer`, with faults that tests switch.

Owns: what each path answers, the counts that tests read, and the thread or process the server runs
in. Does not own: connections (`http.py`), bytes (`wire.py`), signatures and slots (`weights.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from types import TracebackType
from typing import Any

import uvloop

from server.engines.base import EngineAddress
from tests.fake_engine import wire
from tests.fake_engine.faults import Faults
from tests.fake_engine.http import Connection, Exchange, Waiting
from tests.fake_engine.requests import GenerationRequest, Refusal, read_request, refuse_tools
from tests.fake_engine.weights import (
    ANSWER_TOKENS,
    BASE,
    Adapter,
    Slots,
    fake_logprobs,
    fake_signature,
    fake_tokens,
    shifted,
)

RECORDED_REQUESTS = 10_000  #: the newest are kept
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request as it arrived."""

    path: str
    request_id: str | None
    body: dict[str, Any]


class FakeEngine:
    """A fake vLLM server in a thread: `with FakeEngine() as engine`.

    Then `engine.address`, `engine.faults = …`. All attributes may be read, and `faults` assigned,
    from any thread.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        root: str = "/models/tiny",
        api_key: str | None = None,
        max_loras: int = 4,
        max_cpu_loras: int | None = None,
        max_model_len: int = 131_072,
        answer_tokens: int = ANSWER_TOKENS,
        default_system: str | None = None,
        port: int = 0,
    ) -> None:
        self.model = model
        self.root = root
        self.api_key = api_key
        self.max_model_len = max_model_len
        self.answer_tokens = answer_tokens
        self.default_system = default_system  #: of its chat template
        self.port = port
        self.faults = Faults()
        self.requests: deque[RecordedRequest] = deque(maxlen=RECORDED_REQUESTS)
        self.running = 0
        self.waiting = 0
        self.finished = 0
        self.aborted = 0
        self.tokens = 0  #: generated since the start, as vLLM counts them
        self._sizes = max_loras, max_cpu_loras or max_loras
        self._changed = threading.Condition()
        self._random = random.Random(0)
        self._started = 0.0
        self._connections: set[Connection] = set()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._turns: list[asyncio.Future[None]] = []
        self._routes: dict[str, tuple[str, Callable[[Exchange], Waiting | None]]] = {
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/version": ("GET", self._version),
            "/v1/models": ("GET", self._models),
            "/v1/chat/completions": ("POST", self._generate),
            "/v1/completions": ("POST", self._generate),
            "/v1/load_lora_adapter": ("POST", self._load),
            "/v1/unload_lora_adapter": ("POST", self._unload),
            "/tokenize": ("POST", self._tokenize),
            "/fake/faults": ("POST", self._set_faults),
            "/fake/state": ("GET", self._state),
        }
        self.restart()

    # What tests hold

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> EngineAddress:
        return EngineAddress(id=f"fake-{self.port}", url=self.url, api_key=self.api_key)

    @property
    def adapters(self) -> dict[str, str]:
        """Served adapters, each with its path."""
        return {adapter.name: adapter.path for adapter in self.slots.served.values()}

    def restart(self) -> None:
        """Forget every adapter and change the boot id, as a new process does. Connections stay."""
        self.slots = Slots(*self._sizes, self._read_signature)
        self.dead = False
        self._started = max(time.time(), self._started + 0.01)

    def wait_until(
        self, condition: Callable[[FakeEngine], bool], timeout_seconds: float = 10.0
    ) -> None:
        """Block until `condition(self)` holds, looking at each change of the counts.

        `TimeoutError` otherwise.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_seconds):
                raise TimeoutError(f"not within {timeout_seconds} s: {self.state()}")

    def state(self) -> dict[str, Any]:
        """The counts, what is served, and what is in memory (least recently used first)."""
        return {
            "running": self.running,
            "waiting": self.waiting,
            "finished": self.finished,
            "aborted": self.aborted,
            "loads": self.slots.loads,
            "evictions": self.slots.evictions,
            "adapters": self.adapters,
            "in_memory": self.slots.in_memory,
        }

    def __enter__(self) -> FakeEngine:
        listener = self._listen()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="fake-engine")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()

    def run(self) -> None:
        """Serve in this thread until the process ends."""
        self._run(self._listen())

    # The server's own thread

    def _listen(self) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=4096)
        self.port = listener.getsockname()[1]
        return listener

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Connection(self._handle, self._connections), sock=listener
        )
        await asyncio.to_thread(self._stop.wait)
        server.close()
        # Whatever a client hasn't read yet would keep its connection open beyond the loop's end.
        await asyncio.gather(*(connection.abort() for connection in list(self._connections)))

    def _handle(self, exchange: Exchange) -> Waiting | None:
        """Answer one request, or return what answers it in time."""
        if exchange.path.startswith("/v1") and not self._is_authorised(exchange):
            exchange.reply(401, b'{"error":"Unauthorized"}')
            return None
        method, answer = self._routes.get(exchange.path, (exchange.method, _not_found))
        if method != exchange.method:
            exchange.reply(405, b'{"detail":"Method Not Allowed"}')
            return None
        try:
            waiting = answer(exchange)
        except Refusal as refusal:
            exchange.reply(refusal.status, refusal.reply)
            return None
        return waiting and _refusing(exchange, waiting)

    def _is_authorised(self, exchange: Exchange) -> bool:
        sent = exchange.headers.get(b"authorization", b"")
        return self.api_key is None or hmac.compare_digest(sent, f"Bearer {self.api_key}".encode())

    def _body(self, exchange: Exchange) -> tuple[dict[str, Any], str | None]:
        """The JSON object that was sent, which is recorded, and the request's id."""
        try:
            body = json.loads(exchange.body)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Refusal(400, "1 validation error:\n  JSON decode error", "Bad Request", "body")
        sent_id = exchange.headers.get(b"x-request-id")
        request_id = sent_id.decode() if sent_id is not None else None
        self.requests.append(RecordedRequest(exchange.path, request_id, body))
        return body, request_id

    # Generation

    def _generate(self, exchange: Exchange) -> Waiting | None:
        body, request_id = self._body(exchange)
        adapter = self._find(body)
        faults = self.faults
        if faults.lacks_tool_parser:
            refuse_tools(body)
        request = read_request(
            body,
            chat=exchange.path == "/v1/chat/completions",
            request_id=request_id,
            model=faults.answers_as or (adapter.name if adapter else self.model),
            answer_tokens=self.answer_tokens,
            max_model_len=self.max_model_len,
            default_system=self.default_system,
        )
        if faults.hangs_up:
            exchange.hang_up()
            return None
        if faults.says is not None:
            exchange.reply(200, faults.says.encode())
            return None
        if faults.error_status is not None:
            raise Refusal(faults.error_status, DEAD, "InternalServerError")
        if faults.takes_time or not self.slots.has_room(adapter):
            return self._generate_slowly(exchange, request, adapter, faults)
        with self._generation(adapter) as signature:
            answer = request.answer(signature, self._figures)
            if request.stream:
                steps = chain.from_iterable(answer.steps(usage_follows=request.usage))
                exchange.start_stream()
                exchange.send([*answer.opening(), *steps, *answer.closing(usage=request.usage)])
                exchange.end()
            else:
                exchange.reply(200, answer.whole())
            self.tokens += answer.completion_tokens
        return None

    async def _generate_slowly(
        self,
        exchange: Exchange,
        request: GenerationRequest,
        adapter: Adapter | None,
        faults: Faults,
    ) -> None:
        await self._admit(adapter)
        with self._generation(adapter) as signature:
            answer = request.answer(signature, self._figures)
            if request.stream:
                exchange.start_stream()
            await asyncio.sleep(faults.first_token_seconds)
            if request.stream:
                exchange.send(answer.opening())
            steps = answer.steps(usage_follows=request.usage, endless=faults.endless)
            for at, events in enumerate(steps):
                if at == faults.dies_after_tokens:
                    exchange.hang_up()
                    return
                if at == faults.errs_after_tokens:
                    failure = wire.error(500, DEAD, "InternalServerError")
                    exchange.send([b"data: %b\n\n" % failure, wire.DONE])
                    exchange.end()
                    return
                if at == faults.stalls_after_tokens:
                    await asyncio.get_running_loop().create_future()  # until the client goes
                self.tokens += len(events)
                if request.stream:
                    exchange.send(events)
                    await exchange.drain()
                await asyncio.sleep(max(faults.token_seconds, 0.001 if faults.endless else 0))
            if request.stream:
                exchange.send(answer.closing(usage=request.usage))
                exchange.end()
            else:
                exchange.reply(200, answer.whole())

    async def _admit(self, adapter: Adapter | None) -> None:
        """Wait while as many other adapters run as there are slots."""
        if self.slots.has_room(adapter):
            return
        self._count(waiting=1)
        try:
            while not self.slots.has_room(adapter):
                turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._turns.append(turn)
                await turn
        finally:
            self._count(waiting=-1)

    @contextmanager
    def _generation(self, adapter: Adapter | None) -> Iterator[str]:
        """Occupy a slot; the signature of the weights in it. Counts how it ended."""
        slots = self.slots
        signature = self._use(adapter)
        slots.start(adapter)
        self._count(running=1)
        finished = False
        try:
            yield slots.cached(adapter, signature)
            finished = True
        finally:
            slots.stop(adapter)
            self._count(running=-1, finished=int(finished), aborted=int(not finished))
            turns, self._turns = self._turns, []
            for turn in turns:
                if not turn.done():
                    turn.set_result(None)

    def _count(
        self, *, running: int = 0, waiting: int = 0, finished: int = 0, aborted: int = 0
    ) -> None:
        with self._changed:
            self.running += running
            self.waiting += waiting
            self.finished += finished
            self.aborted += aborted
            self._changed.notify_all()

    def _figures(self, signature: str, ids: Sequence[int]) -> list[float]:
        figures = shifted(fake_logprobs(signature, ids), ids, self.faults.logprob_shift)
        return [figure + self._random.gauss(0, self.faults.logprob_noise) for figure in figures]

    # Adapters

    def _find(self, body: dict[str, Any]) -> Adapter | None:
        """The adapter that a body names; None: the base."""
        name = body.get("model") or self.model
        if name == self.model:
            return None
        adapter = self.slots.served.get(name)
        if adapter is None:
            message = f"The model `{name}` does not exist. Valid aliases: {self.model}."
            raise Refusal(404, message, "NotFoundError", "model")
        return adapter

    def _use(self, adapter: Adapter | None) -> str:
        """The signature in memory.

        An evicted adapter whose files are gone kills the engine, as it does vLLM.
        """
        if not self.dead:
            try:
                return self.slots.use(adapter)
            except FileNotFoundError:
                self.dead = True
        raise Refusal(500, DEAD, "InternalServerError")

    def _read_signature(self, path: str) -> str:
        signature = fake_signature(path)
        if self.faults.load_does_nothing:
            return BASE
        if self.faults.load_wrong_weights:
            return hashlib.sha256(signature.encode()).hexdigest()[:8]
        return signature

    def _load(self, exchange: Exchange) -> None:
        body, _ = self._body(exchange)
        name, path = body.get("lora_name"), body.get("lora_path")
        bad = "InvalidUserInput"
        if not name or not path:
            raise Refusal(400, "Both 'lora_name' and 'lora_path' must be provided.", bad)
        if name == self.model:
            raise Refusal(
                400, f"The lora adapter '{name}' conflicts with a served base model.", bad
            )
        if name in self.slots.served:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
            raise Refusal(400, message, bad)
        if self.faults.load_fails or self.dead:
            raise Refusal(500, f"Call to add_lora method failed: {name}", "InternalServerError")
        try:
            self.slots.load(name, path)
        except FileNotFoundError:
            # vLLM shows no path of its machine to a client.
            message = f"Loading lora {name} failed: No adapter found for <path>"
            raise Refusal(404, message, "NotFoundError") from None
        self._count()
        exchange.reply(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), None)

    def _unload(self, exchange: Exchange) -> None:
        body, _ = self._body(exchange)
        name = body.get("lora_name")
        if self.slots.served.pop(str(name), None) is None:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self._count()
        exchange.reply(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), None)

    # The rest

    def _models(self, exchange: Exchange) -> None:
        now = int(time.time())
        base = wire.model_card(self.model, self.root, None, self.max_model_len, now)
        adapters = (
            wire.model_card(adapter.name, adapter.path, self.model, None, now)
            for adapter in self.slots.served.values()
        )
        exchange.reply(200, wire.compact({"object": "list", "data": [base, *adapters]}))

    def _tokenize(self, exchange: Exchange) -> None:
        if self.faults.lacks_tokenize:
            _not_found(exchange)
            return
        body, _ = self._body(exchange)
        self._find(body)
        if "messages" in body:
            generate = body.get("add_generation_prompt", True)
            tokens = fake_tokens(
                body["messages"],
                add_generation_prompt=generate,
                default_system=self.default_system,
            )
        else:
            tokens = list(str(body.get("prompt")).encode())
        counts = {"count": len(tokens), "max_model_len": self.max_model_len}
        exchange.reply(200, wire.compact({**counts, "tokens": tokens, "token_strs": None}))

    def _health(self, exchange: Exchange) -> None:
        exchange.reply(503 if self.dead else 200, b"", None)

    def _version(self, exchange: Exchange) -> None:
        exchange.reply(200, b'{"version":"0.32.0"}')

    def _metrics(self, exchange: Exchange) -> None:
        label = f'engine="0",model_name="{self.model}"'
        text = (
            f"process_start_time_seconds {self._started:.2f}\n"
            f"vllm:num_requests_running{{{label}}} {self.running}.0\n"
            f"vllm:num_requests_waiting{{{label}}} {self.waiting}.0\n"
            f"vllm:generation_tokens_total{{{label}}} {self.tokens}.0\n"
        )
        if self.finished:  # vLLM says nothing of its slots before
            names = 'running_lora_adapters="",waiting_lora_adapters=""'
            text += f'vllm:lora_requests_info{{max_lora="{self._sizes[0]}",{names}}} 1.0\n'
        exchange.reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _set_faults(self, exchange: Exchange) -> None:
        try:
            self.faults = Faults(**json.loads(exchange.body))
        except (TypeError, ValueError) as error:
            raise Refusal(400, str(error), "BadRequestError") from None
        exchange.reply(200, wire.compact(asdict(self.faults)))

    def _state(self, exchange: Exchange) -> None:
        recorded = [asdict(request) for request in list(self.requests)]
        exchange.reply(200, wire.compact({**self.state(), "requests": recorded}))


def _not_found(exchange: Exchange) -> None:
    exchange.reply(404, b'{"detail":"Not Found"}')


async def _refusing(exchange: Exchange, waiting: Waiting) -> None:
    try:
        await waiting
    except Refusal as refusal:
        exchange.reply(refusal.status, refusal.reply)
