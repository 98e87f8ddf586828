"""One answer's way from the engine to the client.

Owns: the request to the engine, the hold of the end until it is committed, what the client is sent.
Covered: the client that goes away, the engine that dies before and after the first token, a commit
that fails. Does not own: what the engine's bytes say (`reply.py`, `stream.py`), which release
answers (`routing.py`), the answer's row (`record.py`).

Nothing is sent to the client before the first token is there: until then another engine may take
over, and a failure has a status of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from feedback.answers import MessagesHash
from feedback.errors import AppError, NotReady
from feedback.recording import StartedAnswer
from server.chat.record import Record
from server.chat.recorder import Recorder
from server.chat.reply import Heard, choices_of, count_in, parse, usage_of
from server.chat.stream import DONE, LARGEST_EVENT, Events, Forms, names_of
from server.chat.tracing import CLIENT_LEFT, Trace
from server.engines.base import EngineReply, EngineUnreachable
from server.engines.chooser import Chooser, Replica
from server.errors import (
    EngineFault,
    IntegrityFault,
    NotLoaded,
    event_of,
    fault_of_engine,
)
from server.http.replies import Reply
from server.metrics import Figures

logger = logging.getLogger(__name__)

LARGEST_REPLY = 64 * 1024 * 1024
LARGEST_STREAM = 4 * LARGEST_REPLY  #: of the engine's bytes; each token is an event there
END_SECONDS = 1.0  #: that a stream has to end its body after its last event, for a kept connection
SHUTTING_DOWN = "shutting_down"  #: the code of an error, and of an answer that it ended
WATCH_AFTER_SECONDS = 0.1  #: a client that leaves is noticed from then on

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is asked of an engine, on whose behalf, and under which names."""

    path: str  #: `/v1/chat/completions` or `/v1/completions`
    body: bytes
    request_id: str  #: the completion id without its prefix; the engine answers under it
    engine_name: str
    public_name: str
    stream: bool
    include_usage: bool
    n: int
    started: StartedAnswer
    said: MessagesHash  #: of what the caller sent


@dataclass(slots=True)
class Times:
    """Moments of one answer, of `time.perf_counter`."""

    began: float  #: the request's body was about to be read
    asked: float = 0.0  #: the engine that answered was asked
    first_token: float | None = None  #: of a stream
    heard: float = 0.0  #: the engine's reply had come whole


def stopping() -> NotReady:
    """The 503 for requests that are unanswered at shutdown."""
    return NotReady(
        "the gateway is shutting down; try again", code=SHUTTING_DOWN, retry_after_seconds=1
    )


class Relay:
    """The answer to one exchange.

    Whatever happens here, its row says in the end that it is complete, interrupted or failed.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        chooser: Chooser,
        recorder: Recorder,
        commit_timeout: float,
        engine_timeout: float,
        figures: Figures,
        began: float,
        on_missing_person: Callable[[], None],
        charge: Callable[[int], None] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._exchange = exchange
        self._chooser = chooser
        self._engine_timeout = engine_timeout
        self._charge = charge
        self._trace = trace
        self._figures = figures
        self._times = Times(began)
        self._names = names_of(exchange.engine_name, exchange.public_name)
        self._forget()
        self._record = Record(
            exchange.started,
            exchange.said,
            stream=exchange.stream,
            recorder=recorder,
            commit_timeout=commit_timeout,
            figures=figures,
            on_missing_person=on_missing_person,
            trace=trace,
        )
        self._client_left = False

    async def answer(self, receive: Receive, reply: Reply) -> None:
        """Ask an engine and pass on what it says, for as long as the client is there.

        Runs in a task of its own request: that task is what a client's leaving ends.
        """
        loop, watch = asyncio.get_running_loop(), _Watch(receive, self._leave)
        task = asyncio.current_task()
        assert task is not None
        timer = loop.call_later(WATCH_AFTER_SECONDS, watch.begin, task)
        self._record.begin()
        try:
            await self._answer(reply)
        except asyncio.CancelledError:
            if not self._client_left:
                # Recorded first: a client that doesn't read holds up what is said to it.
                self._record.interrupt(self._heard, SHUTTING_DOWN)
                self._record.take_back()
                await self._say_that_it_stops(reply)
                raise
            task.uncancel()
        except OSError:
            pass  # the client's connection broke while we wrote
        finally:
            timer.cancel()
            watch.end()
            self._record.close()
            self._record.interrupt(self._heard, CLIENT_LEFT)
            if self._trace is not None:
                self._trace.answered(
                    usage=self._heard.usage or {},
                    finish_reasons=list(self._heard.finish.values()),
                    first_token=self._times.first_token,
                    heard=self._times.heard,
                )
            if self._charge is not None:
                self._charge(self._used_tokens())

    def _forget(self) -> None:
        """Begin to hear: at first, and when another engine is asked."""
        self._heard = Heard(chat=self._exchange.path.endswith("chat/completions"))
        self._forms = Forms(self._heard, self._names)

    def _leave(self) -> None:
        self._client_left = True

    async def _say_that_it_stops(self, client: Reply) -> None:
        """The gateway ends, and has waited for this answer for as long as it may."""
        with contextlib.suppress(OSError):
            if not client.begun:
                await client.fail(stopping())
            elif self._exchange.stream:
                await client.send(event_of(stopping()))

    def _used_tokens(self) -> int:
        """Prompt and completion in tokens, for the key's limit.

        A stream that broke has no count of the engine's: then by the bytes sent and the pieces that
        came.
        """
        counted = count_in(self._heard.usage or {}, "total_tokens")
        if counted is not None:
            return counted
        pieces = sum(map(len, self._heard.texts.values()))
        return pieces + (len(self._exchange.body) // 4 if pieces else 0)

    async def _answer(self, reply: Reply) -> None:
        try:
            await self._ask(reply)
        except AppError as error:
            await self._fail(reply, error)
        except OSError:
            raise  # the client's connection broke while we wrote
        except Exception:
            logger.exception(
                "Answer failed", extra={"action": "answer_failed", "id": self._record.id}
            )
            await self._fail(
                reply,
                EngineFault("internal error; the log has it", status=500, code="internal_error"),
            )

    async def _ask(self, client: Reply) -> None:
        """Ask an engine; before the first token, once more on another one."""
        name = self._exchange.engine_name
        replica = self._chooser.choose(name)
        for last in (False, True):
            self._record.engine = replica.id
            try:
                with self._chooser.run(replica, name):
                    await self._exchange_with(replica, client)
                return
            except (EngineUnreachable, NotLoaded) as error:
                self._chooser.suspect(replica, str(error))
                fault = self._gone(error, client)
            except EngineFault as error:
                fault = error
            another = None if last or client.begun else self._chooser.find_another(name, replica)
            if another is None:
                raise fault
            logger.warning(
                "Asking another engine",
                # Not the message: an engine's own words may repeat the prompt.
                extra={
                    "action": "answer_retried",
                    "engine": replica.id,
                    "code": fault.code,
                    "status": fault.status,
                },
            )
            replica = another
            self._forget()

    def _gone(self, error: EngineUnreachable | NotLoaded, client: Reply) -> AppError:
        if isinstance(error, NotLoaded):
            return error
        if client.begun:
            return EngineFault("the engine went away while it answered", code="engine_failed")
        return NotReady("the engine failed before it answered; try again", code="engine_failed")

    async def _exchange_with(self, replica: Replica, client: Reply) -> None:
        exchange = self._exchange
        self._times.asked = time.perf_counter()
        headers = None
        if self._trace is not None:
            headers = self._trace.asked(replica.id, replica.engine.address.url)
        async with replica.engine.post(
            exchange.path,
            exchange.body,
            request_id=exchange.request_id,
            timeout_seconds=self._engine_timeout,
            headers=headers,
        ) as reply:
            if reply.status != 200:
                body = await _read(reply, LARGEST_EVENT)
                raise fault_of_engine(
                    reply.status, body, names={exchange.engine_name: exchange.public_name}
                )
            if exchange.stream:
                await self._relay_stream(reply, client)
            else:
                await self._relay_plain(reply, client)
        self._count()

    def _count(self) -> None:
        """Add a completed answer to the gateway's figures."""
        times, started = self._times, self._exchange.started
        ended = time.perf_counter()
        kind = "streamed" if self._exchange.stream else "plain"
        figures = self._figures.of_release(started.release, str(started.arm))
        figures.duration[kind].observe(ended - times.began)
        figures.overhead.observe(times.asked - times.began + ended - times.heard)
        if times.first_token is not None:
            figures.first_token.observe(times.first_token - times.began)
        usage = self._heard.usage or {}
        figures.prompt_tokens.inc(count_in(usage, "prompt_tokens") or 0)
        figures.completion_tokens.inc(count_in(usage, "completion_tokens") or 0)

    # A reply in one piece

    async def _relay_plain(self, reply: EngineReply, client: Reply) -> None:
        body = await _read(reply, LARGEST_REPLY)
        self._times.heard = time.perf_counter()
        answer = parse(body)
        said = self._choices_of(body, answer, whole=True)
        self._heard.usage = usage_of(answer)
        choices = self._heard.hear_whole(said)
        await self._record.complete(self._heard, choices)
        body = self._names.put_into(body)
        await client.start(
            200, {"content-type": "application/json", "content-length": str(len(body))}
        )
        await client.send(body)
        self._record.sent()

    # A stream

    async def _relay_stream(self, reply: EngineReply, client: Reply) -> None:
        """Pass events on as they arrive, and hold the end until it is committed.

        The end is the last `finish_reason` and all after it. Once that is there, an engine has its
        longest silence for the rest, and does not hold the client by comments.
        """
        passed = bytearray()
        held: list[bytes] = []
        done, length = False, 0
        events, loop = Events(), asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as end:
                async for piece in reply.body:
                    if done:
                        continue  # only its body's end is waited for: the connection is kept then
                    fault: AppError | None = None
                    length += len(piece)
                    if length > LARGEST_STREAM:
                        raise EngineFault(f"the engine's stream passes {LARGEST_STREAM} bytes")
                    for event in events.split(piece):
                        done = done or event == DONE
                        try:
                            renamed = self._hear(event)
                        except AppError as error:
                            fault = error  # what came before it is still the client's
                            break
                        if held or len(self._heard.finish) >= self._exchange.n:
                            held.append(renamed)
                        else:
                            passed += renamed
                    if passed and self._heard.first_token_at is not None:
                        if not client.begun:
                            self._times.first_token = time.perf_counter()
                            await self._record.wait_for_start()
                            await client.start(200, _STREAM_HEADERS)
                        await client.send(bytes(passed), more=True)
                        passed.clear()
                    if fault is not None:
                        raise fault
                    if done:
                        end.reschedule(loop.time() + END_SECONDS)
                    elif held and end.when() is None:
                        end.reschedule(loop.time() + self._engine_timeout)
        except TimeoutError:
            if not end.expired():
                raise
        if not self._heard.texts:
            raise EngineFault("the engine answered 200 with a stream that holds no completion")
        if not done or len(self._heard.finish) < self._exchange.n:
            raise EngineUnreachable("the stream ended early")
        self._times.heard = time.perf_counter()
        await self._record.complete(self._heard)
        if not client.begun:
            await client.start(200, _STREAM_HEADERS)
        await client.send(bytes(passed) + b"".join(held))
        self._record.sent()

    def _hear(self, event: bytes) -> bytes:
        """Take one event into the record; what the client gets of it."""
        renamed = self._forms.hear(event)
        if renamed is not None:
            return renamed
        if event == DONE or event.startswith(b":"):  # the second is a comment
            return event
        if not event.startswith(b"data: "):
            raise EngineFault("the engine's stream holds something other than events of data")
        found = parse(event[6:])
        choices = self._choices_of(event[6:], found, whole=False)
        if choices:
            self._heard.hear(choices)
        self._heard.usage = usage_of(found) or self._heard.usage
        if not choices and not self._exchange.include_usage:
            return b""  # the usage that only the record asked for
        self._forms.learn(event, found)
        return self._names.put_into_event(event)

    # Both

    def _choices_of(
        self, raw: bytes, answer: dict[str, Any], *, whole: bool
    ) -> list[dict[str, Any]]:
        """The choices of an answer or event that is what was asked for. Raises AppError."""
        exchange = self._exchange
        if answer.get("error"):
            names = {exchange.engine_name: exchange.public_name}
            raise fault_of_engine(500, raw, names=names)
        choices = choices_of(answer, chat=self._heard.chat, choices=exchange.n, whole=whole)
        self._check_name(answer)
        return choices

    def _check_name(self, answer: dict[str, Any]) -> None:
        """The engine must answer under the name that it was asked under."""
        if answer.get("model") != self._exchange.engine_name:
            self._figures.integrity_errors.inc()
            logger.critical(
                "Engine answered under another name",
                extra={
                    "action": "integrity_error",
                    "asked": self._exchange.engine_name,
                    "answered": str(answer.get("model"))[:200],
                },
            )
            raise IntegrityFault(
                "the engine answered for another model than it was asked; the answer is withheld"
            )

    async def _fail(self, client: Reply, error: AppError) -> None:
        """Record the failure and say it: as an error reply, or as the stream's last event."""
        if self._trace is not None:
            self._trace.failed(error.code)
        if not self._record.has_ended:
            with contextlib.suppress(NotReady):
                await self._record.fail(self._heard, error.code)
        if client.begun:
            await client.send(event_of(error))
        else:
            await client.fail(error)


class _Watch:
    """Ends the task of a request whose client goes away."""

    def __init__(self, receive: Receive, on_leave: Callable[[], None]) -> None:
        self._receive = receive
        self._on_leave = on_leave
        self._watching: asyncio.Task[None] | None = None

    def begin(self, task: asyncio.Task[Any]) -> None:
        self._watching = asyncio.ensure_future(self._watch(task))

    def end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._on_leave()
        task.cancel()


async def _read(reply: EngineReply, most: int) -> bytes:
    body = bytearray()
    async for piece in reply.body:
        body += piece
        if len(body) > most:
            raise EngineFault(f"the engine's reply passes {most} bytes")
    return bytes(body)
