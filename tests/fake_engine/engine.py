"""The fake engine: vLLM's paths over `Slots` and `Answer`, with faults that tests switch.

Owns: what each path answers, the counts that tests read, and the thread or process the server runs
in. Does not own: connections (`serving.py`), the shape of answers (`answers.py`), signatures and
slots (`weights.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any

import uvloop
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engines.base import EngineAddress
from tests.fake_engine.answers import DONE, Answer, compact, error, model_card
from tests.fake_engine.faults import Faults
from tests.fake_engine.requests import GenerationRequest, Refusal, read_request, refuse_tools
from tests.fake_engine.serving import hang_up, send_events, serve, start_stream, while_connected
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
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._turns: list[asyncio.Future[None]] = []
        self._app = self._build_app()
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
            runner.run(serve(self, listener, self._stop))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it; below `/v1` it needs the key."""
        may = self._is_authorised(scope) or not scope["path"].startswith("/v1")
        app = self._app if may else _json({"error": "Unauthorized"}, 401)
        await app(scope, receive, send)

    def _is_authorised(self, scope: Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        return self.api_key is None or hmac.compare_digest(sent, f"Bearer {self.api_key}".encode())

    def _build_app(self) -> FastAPI:
        """vLLM's paths, and two of our own; other paths and methods are refused as vLLM does."""
        app = FastAPI(openapi_url=None)
        app.add_exception_handler(Refusal, _refuse)
        for method, path, answer in (
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
            ("GET", "/version", self._version),
            ("GET", "/v1/models", self._models),
            ("POST", "/v1/chat/completions", self._generate),
            ("POST", "/v1/completions", self._generate),
            ("POST", "/v1/load_lora_adapter", self._load),
            ("POST", "/v1/unload_lora_adapter", self._unload),
            ("POST", "/tokenize", self._tokenize),
            ("POST", "/fake/faults", self._set_faults),
            ("GET", "/fake/state", self._state),
        ):
            app.add_route(path, answer, methods=[method])
        return app

    async def _body(self, request: Request) -> tuple[dict[str, Any], str | None]:
        """The JSON object that was sent, which is recorded, and the request's id."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Refusal(400, "1 validation error:\n  JSON decode error", "Bad Request", "body")
        request_id = request.headers.get("x-request-id")
        self.requests.append(RecordedRequest(request.scope["path"], request_id, body))
        return body, request_id

    # Generation

    async def _generate(self, http: Request) -> ASGIApp:
        body, request_id = await self._body(http)
        adapter = self._find(body)
        faults = self.faults
        if faults.lacks_tool_parser:
            refuse_tools(body)
        request = read_request(
            body,
            chat=http.scope["path"] == "/v1/chat/completions",
            request_id=request_id,
            model=faults.answers_as or (adapter.name if adapter else self.model),
            answer_tokens=self.answer_tokens,
            max_model_len=self.max_model_len,
            default_system=self.default_system,
        )
        if faults.hangs_up:
            return hang_up
        if faults.says is not None:
            return _json(faults.says.encode())
        if faults.error_status is not None:
            raise Refusal(faults.error_status, DEAD, "InternalServerError")
        if faults.takes_time or not self.slots.has_room(adapter):
            return while_connected(partial(self._generate_slowly, request, adapter, faults))
        with self._generation(adapter) as signature:
            answer = request.answer(signature, self._figures)
            self.tokens += answer.completion_tokens
        return _at_once(request, answer)

    async def _generate_slowly(
        self,
        request: GenerationRequest,
        adapter: Adapter | None,
        faults: Faults,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        await self._admit(adapter)
        with self._generation(adapter) as signature:
            answer = request.answer(signature, self._figures)
            if request.stream:
                await start_stream(send)
            await asyncio.sleep(faults.first_token_seconds)
            if request.stream:
                await send_events(send, answer.opening())
            steps = answer.steps(usage_follows=request.usage, endless=faults.endless)
            for at, events in enumerate(steps):
                if at == faults.dies_after_tokens:
                    await hang_up(scope, receive, send)
                    return
                if at == faults.errs_after_tokens:
                    failure = error(500, DEAD, "InternalServerError")
                    await send_events(send, [b"data: %b\n\n" % failure, DONE], last=True)
                    return
                if at == faults.stalls_after_tokens:
                    await asyncio.get_running_loop().create_future()  # until the client goes
                self.tokens += len(events)
                if request.stream:
                    await send_events(send, events)
                await asyncio.sleep(max(faults.token_seconds, 0.001 if faults.endless else 0))
            if request.stream:
                await send_events(send, answer.closing(usage=request.usage), last=True)
            else:
                await _json(answer.whole())(scope, receive, send)

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

    async def _load(self, request: Request) -> Response:
        body, _ = await self._body(request)
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
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        body, _ = await self._body(request)
        name = body.get("lora_name")
        if self.slots.served.pop(str(name), None) is None:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self._count()
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    # The rest

    async def _models(self, request: Request) -> Response:
        now = int(time.time())
        base = model_card(self.model, self.root, None, self.max_model_len, now)
        adapters = (
            model_card(adapter.name, adapter.path, self.model, None, now)
            for adapter in self.slots.served.values()
        )
        return _json({"object": "list", "data": [base, *adapters]})

    async def _tokenize(self, request: Request) -> Response:
        if self.faults.lacks_tokenize:
            raise HTTPException(404)
        body, _ = await self._body(request)
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
        return _json({**counts, "tokens": tokens, "token_strs": None})

    async def _health(self, request: Request) -> Response:
        return Response(status_code=503 if self.dead else 200)

    async def _version(self, request: Request) -> Response:
        return _json({"version": "0.32.0"})

    async def _metrics(self, request: Request) -> Response:
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
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _set_faults(self, request: Request) -> Response:
        try:
            self.faults = Faults(**await request.json())
        except (TypeError, ValueError) as wrong:
            raise Refusal(400, str(wrong), "BadRequestError") from None
        return _json(asdict(self.faults))

    async def _state(self, request: Request) -> Response:
        recorded = [asdict(request) for request in list(self.requests)]
        return _json({**self.state(), "requests": recorded})


def _json(value: Any, status: int = 200) -> Response:
    """`value` as JSON; bytes are JSON already."""
    body = value if isinstance(value, bytes) else compact(value)
    return Response(body, status, media_type="application/json")


def _at_once(request: GenerationRequest, answer: Answer) -> ASGIApp:
    """An answer that takes no time."""
    if not request.stream:
        return _json(answer.whole())

    async def run(_scope: Scope, _receive: Receive, send: Send) -> None:
        await start_stream(send)
        steps = answer.steps(usage_follows=request.usage)
        events = chain(answer.opening(), *steps, answer.closing(usage=request.usage))
        await send_events(send, events, last=True)

    return run


async def _refuse(_request: Request, refusal: Refusal) -> Response:
    return _json(refusal.reply, refusal.status)
