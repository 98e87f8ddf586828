"""One answer's way from the engine to the client, with its record.

Owns: the request to the engine, the split of a stream at event ends, the public name in the bytes,
the hold of the end until it is committed. Covered: the client that goes away, the engine that dies
before and after the first token, a commit that fails. Does not own: which release answers
(`routing.py`) or how rows are written (`recorder.py`).

Nothing is sent to the client before the first token is there: until then another engine may take
over, and a failure has a status of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feedback.answers import EndedAnswer, StartedAnswer
from feedback.db import now
from feedback.errors import AppError, NotReady
from feedback.tables import AnswerStatus
from server.engines.base import EngineReply, EngineUnreachable
from server.engines.fleet import Fleet, Member
from server.errors import (
    EngineFault,
    IntegrityFault,
    NotLoaded,
    envelope_of,
    event_of,
    fault_of_engine,
    headers_of,
)
from server.metrics import Figures
from server.recorder import NotRecorded, Recorder

logger = logging.getLogger(__name__)

LARGEST_EVENT = 4 * 1024 * 1024
LARGEST_REPLY = 64 * 1024 * 1024
DONE = b"data: [DONE]\n\n"


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
    messages: list[dict[str, Any]]  #: the caller's
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Heard:
    """What the engine has said so far, put together for the record."""

    chat: bool
    texts: dict[int, list[str]] = field(default_factory=dict)
    reasoning: dict[int, list[str]] = field(default_factory=dict)
    tool_calls: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    first_token_at: datetime | None = None

    def hear(self, choices: list[dict[str, Any]]) -> None:
        """Add one event's choices."""
        for choice in choices:
            index = choice["index"]
            delta = choice.get("delta") or {}
            text = delta.get("content") if self.chat else choice.get("text")
            thought = delta.get("reasoning") or delta.get("reasoning_content")
            if (text or thought or delta.get("tool_calls")) and self.first_token_at is None:
                self.first_token_at = now()
            self.texts.setdefault(index, [])
            if text:
                self.texts[index].append(text)
            if thought:
                self.reasoning.setdefault(index, []).append(thought)
            for call in delta.get("tool_calls") or ():
                self._hear_call(index, call)
            if choice.get("finish_reason") is not None:
                self.finish[index] = choice["finish_reason"]

    def _hear_call(self, index: int, call: dict[str, Any]) -> None:
        calls = self.tool_calls.setdefault(index, {})
        known = calls.setdefault(
            call.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}}
        )
        if call.get("id"):
            known["id"] = call["id"]
        function = call.get("function") or {}
        known["function"]["name"] += function.get("name") or ""
        known["function"]["arguments"] += function.get("arguments") or ""

    def choices(self) -> list[dict[str, Any]]:
        """As OpenAI's choices, partial where the stream broke."""
        made = []
        for index in sorted(self.texts):
            message: dict[str, Any] = {"role": "assistant", "content": "".join(self.texts[index])}
            if index in self.tool_calls:
                message["tool_calls"] = [call for _, call in sorted(self.tool_calls[index].items())]
                message["content"] = message["content"] or None
            made.append(
                {"index": index, "message": message, "finish_reason": self.finish.get(index)}
            )
        return made

    def thoughts(self) -> list[str | None] | None:
        if not self.reasoning:
            return None
        return [
            "".join(self.reasoning[i]) if i in self.reasoning else None for i in sorted(self.texts)
        ]


@dataclass(slots=True)
class Times:
    """Moments of one answer, of `time.perf_counter`."""

    began: float  #: the request's body was about to be read
    asked: float = 0.0  #: the engine that answered was asked
    first_token: float | None = None  #: of a stream
    heard: float = 0.0  #: the engine's reply had come whole


class Relay(Response):
    """The reply to one exchange: an ASGI response that asks the engine when it is sent.

    The row is `started` before this object exists. Whatever happens here, the row ends as complete,
    interrupted or failed, exactly once.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        fleet: Fleet,
        recorder: Recorder,
        commit_timeout: float,
        engine_timeout: float,
        figures: Figures,
        began: float,
        charge: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self._fleet = fleet
        self._recorder = recorder
        self._commit_timeout = commit_timeout
        self._engine_timeout = engine_timeout
        self._charge = charge
        self._figures = figures
        self._times = Times(began)
        self._heard = Heard(chat=exchange.path.endswith("chat/completions"))
        self._names = _renames(exchange.engine_name, exchange.public_name)
        self._recorded = False
        self._begun = False
        self._engine_id: str | None = exchange.started.engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._answer(send))
        leaving = asyncio.ensure_future(_client_leaves(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            try:
                if answering.done():
                    await _quietly(answering)
                else:
                    answering.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.shield(_quietly(answering))
            finally:
                if not self._recorded:
                    self._recorded = True
                    self._recorder.record_soon(self._ended(AnswerStatus.INTERRUPTED, "client_left"))
                if self._charge is not None:
                    self._charge(self._used_tokens())

    def _used_tokens(self) -> int:
        """Prompt and completion, for the key's limit. A stream that broke has no count of the
        engine's: then by the bytes sent and the pieces that came.
        """
        counted = (self._heard.usage or {}).get("total_tokens")
        if isinstance(counted, int):
            return counted
        pieces = sum(map(len, self._heard.texts.values()))
        return pieces + (len(self._exchange.body) // 4 if pieces else 0)

    async def _answer(self, send: Send) -> None:
        try:
            await self._ask(send)
        except AppError as error:
            await self._fail(send, error)
        except OSError:
            raise  # the client's connection broke while we wrote
        except Exception:
            logger.exception(
                "Answer failed", extra={"action": "answer_failed", "id": self._exchange.started.id}
            )
            await self._fail(
                send,
                EngineFault("internal error; the log has it", status=500, code="internal_error"),
            )

    async def _ask(self, send: Send) -> None:
        """Ask an engine; before the first token, once more on another one."""
        name = self._exchange.engine_name
        member = self._fleet.choose(name)
        for last in (False, True):
            self._engine_id = member.id
            try:
                with self._fleet.run(member, name):
                    await self._exchange_with(member, send)
                return
            except (EngineUnreachable, NotLoaded) as error:
                self._fleet.suspect(member, str(error))
                fault = self._gone(error)
            except EngineFault as error:
                fault = error
            another = None if last or self._begun else self._fleet.find_another(name, member)
            if another is None:
                raise fault
            logger.warning(
                "Asking another engine",
                extra={"action": "answer_retried", "engine": member.id, "error": fault.message},
            )
            member, self._heard = another, Heard(chat=self._heard.chat)

    def _gone(self, error: EngineUnreachable | NotLoaded) -> AppError:
        if isinstance(error, NotLoaded):
            return error
        if self._begun:
            return EngineFault("the engine went away while it answered", code="engine_failed")
        return NotReady("the engine failed before it answered; try again", code="engine_failed")

    async def _exchange_with(self, member: Member, send: Send) -> None:
        exchange = self._exchange
        self._times.asked = time.perf_counter()
        async with member.engine.post(
            exchange.path,
            exchange.body,
            request_id=exchange.request_id,
            timeout_seconds=self._engine_timeout,
        ) as reply:
            if reply.status != 200:
                body = await _read(reply, LARGEST_EVENT)
                raise fault_of_engine(
                    reply.status, body, names={exchange.engine_name: exchange.public_name}
                )
            if exchange.stream:
                await self._relay_stream(reply, send)
            else:
                await self._relay_plain(reply, send)
        self._count()

    def _count(self) -> None:
        """Add a completed answer to the gateway's figures."""
        times, figures, started = self._times, self._figures, self._exchange.started
        ended = time.perf_counter()
        kind = "streamed" if self._exchange.stream else "plain"
        figures.duration[kind].observe(ended - times.began)
        figures.overhead.observe(times.asked - times.began + ended - times.heard)
        if times.first_token is not None:
            figures.first_token.observe(times.first_token - times.began)
        usage = self._heard.usage or {}
        for name, counter in (
            ("prompt_tokens", figures.prompt_tokens),
            ("completion_tokens", figures.completion_tokens),
        ):
            counter.add(started.release, str(started.arm), amount=usage.get(name) or 0)

    # A reply in one piece

    async def _relay_plain(self, reply: EngineReply, send: Send) -> None:
        body = await _read(reply, LARGEST_REPLY)
        self._times.heard = time.perf_counter()
        answer = _parse(body)
        self._check(answer)
        self._heard.usage = answer.get("usage")
        choices = []
        for choice in answer["choices"]:
            index = choice["index"]
            if not self._heard.chat:
                message = {"role": "assistant", "content": choice.get("text") or ""}
            else:
                given = choice["message"]
                message = {"role": "assistant", "content": given.get("content")}
                if given.get("tool_calls"):
                    message["tool_calls"] = given["tool_calls"]
                thought = given.get("reasoning") or given.get("reasoning_content")
                if thought:
                    self._heard.reasoning[index] = [thought]
            self._heard.texts[index] = [message["content"] or ""]
            choices.append(
                {"index": index, "message": message, "finish_reason": choice.get("finish_reason")}
            )
        await self._commit(self._ended(AnswerStatus.COMPLETE, choices=choices))
        body = self._rename(body)
        headers = {
            **self._exchange.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        await self._start(send, 200, headers)
        await send({"type": "http.response.body", "body": body})

    # A stream

    async def _relay_stream(self, reply: EngineReply, send: Send) -> None:
        """Pass events on as they arrive;

        hold the last `finish_reason` and all after it until it is committed.
        """
        passed = bytearray()
        held: list[bytes] = []
        done = False
        async for events in _events(reply.body):
            fault: AppError | None = None
            for event in events:
                done = done or event == DONE
                try:
                    renamed = self._hear(event)
                except AppError as error:
                    fault = error  # what came before it in the same piece is still the client's
                    break
                if held or len(self._heard.finish) >= self._exchange.n:
                    held.append(renamed)
                else:
                    passed += renamed
            if passed and self._heard.first_token_at is not None:
                if not self._begun:
                    self._times.first_token = time.perf_counter()
                    await self._start_stream(send)
                await send({"type": "http.response.body", "body": bytes(passed), "more_body": True})
                passed.clear()
            if fault is not None:
                raise fault
        if not done or len(self._heard.finish) < self._exchange.n:
            raise EngineUnreachable("the stream ended early")
        self._times.heard = time.perf_counter()
        await self._commit(self._ended(AnswerStatus.COMPLETE))
        await self._start_stream(send)
        rest = bytes(passed) + b"".join(held)
        await send({"type": "http.response.body", "body": rest, "more_body": False})

    async def _start_stream(self, send: Send) -> None:
        if self._begun:
            return
        headers = {
            **self._exchange.headers,
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        await self._start(send, 200, headers)

    def _hear(self, event: bytes) -> bytes:
        """Take one event into the record; what the client gets of it."""
        if not event.startswith(b"data: ") or event == DONE:
            return event
        found = _parse(event[6:])
        if "error" in found:
            names = {self._exchange.engine_name: self._exchange.public_name}
            raise fault_of_engine(500, event[6:], names=names)
        self._check(found)
        choices = found.get("choices") or []
        self._heard.hear(choices)
        if found.get("usage"):
            self._heard.usage = found["usage"]
        if not choices and not self._exchange.include_usage:
            return b""  # the usage that only the record asked for
        return b"data: " + self._rename(event[6:-2]) + b"\n\n"

    # Both

    def _check(self, answer: dict[str, Any]) -> None:
        """The engine must answer under the name that it was asked under."""
        if answer.get("model") != self._exchange.engine_name:
            self._fleet.integrity_errors += 1
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

    def _rename(self, raw: bytes) -> bytes:
        """Put the public name in the place of the engine's.

        A quote inside a JSON string is always escaped, so the first match is the field itself.
        """
        for old, new in self._names:
            if old in raw:
                return raw.replace(old, new, 1)
        answer = _parse(raw)  # an engine that writes its JSON in another way
        answer["model"] = self._exchange.public_name
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()

    async def _start(self, send: Send, status: int, headers: dict[str, str]) -> None:
        self._begun = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def _commit(self, ended: EndedAnswer) -> None:
        """Returns after COMMIT, also when this task is cancelled meanwhile.

        Raises `not_recorded` after a time.
        """
        self._recorded = True  # from here on the row is the recorder's
        try:
            async with asyncio.timeout(self._commit_timeout):
                await self._recorder.record(ended)
        except (TimeoutError, NotRecorded):
            self._figures.not_recorded.add()
            raise NotReady(
                "the answer could not be recorded and is withheld; try again", code="not_recorded"
            ) from None

    def _ended(
        self,
        status: AnswerStatus,
        error_code: str | None = None,
        choices: list[dict[str, Any]] | None = None,
    ) -> EndedAnswer:
        started, usage = self._exchange.started, self._heard.usage or {}
        return EndedAnswer(
            id=started.id,
            person_id=started.person_id,
            status=status,
            choices=self._heard.choices() if choices is None else choices,
            messages=self._exchange.messages,
            reasoning=self._heard.thoughts(),
            stored=started.stored,
            error_code=error_code,
            engine=self._engine_id,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            first_token_at=self._heard.first_token_at,
        )

    async def _fail(self, send: Send, error: AppError) -> None:
        """Record the failure and say it: as an error reply, or as the stream's last event."""
        if not self._recorded:
            partial = any(self._heard.texts.values())
            status = AnswerStatus.INTERRUPTED if partial else AnswerStatus.FAILED
            with contextlib.suppress(NotReady):
                await self._commit(self._ended(status, error.code))
        if self._begun:
            await send({"type": "http.response.body", "body": event_of(error), "more_body": False})
            return
        body = json.dumps(envelope_of(error)).encode()
        headers = {
            **self._exchange.headers,
            **headers_of(error),
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        await self._start(send, error.status, headers)
        await send({"type": "http.response.body", "body": body})


def _renames(engine_name: str, public_name: str) -> list[tuple[bytes, bytes]]:
    """The `model` field as an engine may write it, and as the client gets it."""
    new = json.dumps(public_name, ensure_ascii=False).encode()
    forms = dict.fromkeys(json.dumps(engine_name, ensure_ascii=plain) for plain in (False, True))
    return [
        (b'"model":' + space + form.encode(), b'"model":' + space + new)
        for space in (b"", b" ")
        for form in forms
    ]


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _quietly(task: asyncio.Future[None]) -> None:
    """Wait until `task` has ended; a client that went away is no error of ours."""
    with contextlib.suppress(asyncio.CancelledError, OSError):
        await task


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        found = from_json(raw)
    except ValueError:
        raise EngineFault("the engine's answer is not JSON") from None
    if not isinstance(found, dict):
        raise EngineFault("the engine's answer is not a JSON object")
    return found


async def _read(reply: EngineReply, most: int) -> bytes:
    body = bytearray()
    async for piece in reply.body:
        body += piece
        if len(body) > most:
            raise EngineFault(f"the engine's reply passes {most} bytes")
    return bytes(body)


async def _events(body: AsyncIterator[bytes]) -> AsyncIterator[Iterator[bytes]]:
    """Whole server-sent events, grouped as they arrived; each ends with its blank line."""
    rest = b""
    async for piece in body:
        rest = rest + piece if rest else piece
        end = rest.rfind(b"\n\n")
        if end < 0:
            if len(rest) > LARGEST_EVENT:
                raise EngineFault(f"an event of the engine passes {LARGEST_EVENT} bytes")
            continue
        whole, rest = rest[: end + 2], rest[end + 2 :]
        yield (event + b"\n\n" for event in whole.split(b"\n\n")[:-1])
