"""`POST /v1/chat/completions` and `POST /v1/completions`.

The hot path: parsed once, checked and routed from memory, handed to the relay (`chat/relay.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.types import Receive, Send
from starlette.types import Scope as HttpScope

from feedback.answers import (
    EarlierAnswer,
    MessagesHash,
    continuation_hash,
    find_earlier,
    root_hash,
    was_answered,
)
from feedback.errors import AppError, BadRequest, NotReady
from feedback.recording import NOT_RECORDED, StartedAnswer
from feedback.tables import AnswerKind, Arm
from server.access.keyring import Caller, KeyView, check_scope
from server.access.limits import Admission
from server.access.scopes import Scope
from server.chat.directory import load_release
from server.chat.engine_request import encode_body, engine_body, with_system_prompt
from server.chat.recorder import NotSent
from server.chat.relay import Exchange, Relay, stopping
from server.chat.request import (
    ChatRequest,
    Parsed,
    TextRequest,
    check_tools,
    is_task,
    offers_tools,
    parse_chat,
    parse_text,
)
from server.chat.routing import ReleaseView, Route, check_model, route, unknown_model
from server.chat.tracing import Trace
from server.engines.chooser import Hold
from server.gateway import Gateway
from server.http.bodies import parse_body, read_body, refuse_nul
from server.http.replies import IGNORED_HEADER, Reply
from server.http.request_ids import identify
from tuner.tables import ReleaseState

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"

LARGE_BYTES = 64 * 1024  #: of a body: its text takes a millisecond to be normalised

router = APIRouter(tags=["chat"])


def _body_of(model: type[ChatRequest] | type[TextRequest]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    for field in schema["properties"].values():
        if "$ref" in json.dumps(field):
            field.clear()
            field["type"] = "object"
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@router.post(CHAT_PATH, openapi_extra=_body_of(ChatRequest))
async def create_chat_completion() -> None:
    """Answer a conversation: OpenAI's chat completions, streamed or not."""
    raise AssertionError("`Completions` answers this before it gets here")


@router.post(TEXT_PATH, openapi_extra=_body_of(TextRequest))
async def create_completion() -> None:
    """Continue a text: OpenAI's legacy completions, streamed or not."""
    raise AssertionError("`Completions` answers this before it gets here")


class Completions:
    """Answers the two routes above; pure ASGI, in the place of FastAPI and every middleware.

    What these did for a request took a third of its time, so all of it is done here in one
    function: key, limits, scope, body, the error envelope, the headers and figures of the reply.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @staticmethod
    def answers(scope: HttpScope) -> bool:
        """Whether a request is for one of the two."""
        return (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and scope["path"] in (CHAT_PATH, TEXT_PATH)
        )

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        gateway, path = self._gateway, scope["path"]
        began, number = time.perf_counter(), identify(scope)
        reply = Reply(send, number, gateway.figures, route=path)
        admission: Admission | None = None
        trace: Trace | None = None
        hold = gateway.chooser.holding()
        try:
            if gateway.tracer is not None:
                trace = gateway.tracer.start(scope)
            headers = _decoded(scope["headers"])
            key = gateway.callers.authenticate(scope)
            account = gateway.limits.account(key)
            if account is not None:
                reply.limited_by(account)
                admission = account.admit(with_tokens=True)
            check_scope(key, "POST", path)
            if gateway.stopping:
                raise stopping()
            raw = await read_body(receive, gateway.settings.gateway.max_body_bytes)
            caller, exchange = await _prepare(gateway, key, headers, path, raw, number, reply, hold)
            if trace is not None:
                trace.describe(exchange.started, stream=exchange.stream, choices=exchange.n)
            await _check_recorder(gateway)
            relay = Relay(
                exchange,
                chooser=gateway.chooser,
                recorder=gateway.recorder,
                commit_timeout=gateway.settings.gateway.commit_timeout_seconds,
                engine_timeout=gateway.settings.gateway.engine_timeout_seconds,
                charge=None if admission is None else admission.charge,
                figures=gateway.figures,
                began=began,
                on_missing_person=lambda: gateway.callers.forget(caller.key.user),
                trace=trace,
            )
            await relay.answer(receive, reply)
        except asyncio.CancelledError:
            if not reply.begun:  # the gateway ends, and has waited long enough
                with contextlib.suppress(OSError):
                    await reply.fail(stopping())
            raise
        except Exception as error:
            if trace is not None:
                trace.failed(error.code if isinstance(error, AppError) else "internal_error")
            if reply.begun:
                raise
            await reply.fail(error)
        finally:
            hold.end()
            if trace is not None:
                trace.end(reply.status)
            if admission is not None:
                admission.end()


def _decoded(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """By lower-case name; of one that stands twice the first."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(headers)}


async def _prepare(
    gateway: Gateway,
    key: KeyView,
    headers: Mapping[str, str],
    path: str,
    raw: bytes,
    number: str,
    reply: Reply,
    hold: Hold,
) -> tuple[Caller, Exchange]:
    """Parse, check and route: who asks, and what an engine will be asked.

    What the caller has to mend is said before what has to be waited for: the body, then the model's
    name, then engines and slots. The release that answers is in `hold`.
    """
    settings = gateway.settings.gateway
    body = parse_body(raw, max_bytes=settings.max_body_bytes)
    refuse_nul(raw)
    parse = parse_chat if path == CHAT_PATH else parse_text
    parsed = parse(body, max_choices=settings.max_choices, strict=settings.strict)
    if path == CHAT_PATH and parsed.given.keys() & {"tools", "tool_choice"}:
        parses = await gateway.parses_tools() if offers_tools(parsed) else None
        parsed = check_tools(parsed, parses, strict=settings.strict)
    kind = _kind(gateway, key, parsed, path)
    external_id = _external_conversation(parsed.given, headers, settings.conversation_headers)
    check_model(gateway.directory.snapshot, parsed.model, key.deployments)
    pinned = await _find_pinned(gateway, key, parsed.model) if "@" in parsed.model else None
    caller = await gateway.callers.caller(key, body, headers)
    gateway.chooser.check_ready()
    if kind is AnswerKind.TASK:
        external_id = None  # about a conversation, not of it: its release must not become theirs
    said = MessagesHash(caller.person_id, parsed.messages)
    continuation = continuation_hash(caller.person_id, parsed.messages)
    earlier, regenerates = await _earlier(gateway, caller, continuation, str(said), external_id)
    chosen = await _route(
        gateway, caller, parsed.model, pinned, None if regenerates else earlier, hold
    )
    gateway.chooser.choose(chosen.engine_name)  # 503 before anything is recorded
    # Of a text that is large other requests don't wait for it.
    root = (
        root_hash(parsed.messages)
        if len(raw) < LARGE_BYTES
        else await asyncio.to_thread(root_hash, parsed.messages)
    )
    exchange = _exchange(
        gateway, caller, parsed, chosen, path, kind, said, earlier, external_id, number, root
    )
    reply.headers["x-burnish-release"] = _header_value(chosen.public_name)
    reply.headers["x-burnish-stored"] = "true" if exchange.started.stored else "false"
    if parsed.ignored:
        reply.headers[IGNORED_HEADER] = _header_value(", ".join(parsed.ignored))
    return caller, exchange


def _kind(gateway: Gateway, key: KeyView, parsed: Parsed, path: str) -> AnswerKind:
    if key.allows(Scope.INTERNAL):
        return AnswerKind.INTERNAL
    if path == TEXT_PATH:
        return AnswerKind.TEXT
    is_own = is_task(parsed, gateway.settings.gateway.task_prompts)
    return AnswerKind.TASK if is_own else AnswerKind.CHAT


async def _check_recorder(gateway: Gateway) -> None:
    """No engine is asked for what is known not to be recorded. Raises NotReady."""
    try:
        await gateway.recorder.check(gateway.settings.gateway.commit_timeout_seconds)
    except NotSent:
        gateway.figures.not_recorded.inc()
        raise NotReady("the request could not be recorded; try again", code=NOT_RECORDED) from None


def _external_conversation(
    body: Mapping[str, Any], headers: Mapping[str, str], names: list[str]
) -> str | None:
    metadata = body.get("metadata") or {}
    found = metadata.get("conversation_id") or next(
        (headers[n.lower()] for n in names if headers.get(n.lower())), None
    )
    if found is not None and (len(found) > 256 or "\x00" in found):
        raise BadRequest(
            "a conversation id has at most 256 characters and no NUL", param="metadata"
        )
    return found


async def _earlier(
    gateway: Gateway,
    caller: Caller,
    continuation: str | None,
    prefix: str,
    external_id: str | None,
) -> tuple[EarlierAnswer | None, bool]:
    """The answer that this request continues, and whether the same was answered before.

    First turns ask the database nothing: they and regenerations are routed anew.
    """
    if continuation is None:
        return None, False

    def look() -> tuple[EarlierAnswer | None, bool]:
        with gateway.database.read() as session:
            earlier = find_earlier(
                session, caller.person_id, continuation=continuation, external_id=external_id
            )
            return earlier, earlier is not None and was_answered(session, caller.person_id, prefix)

    return await asyncio.to_thread(look)


async def _find_pinned(gateway: Gateway, key: KeyView, model: str) -> ReleaseView:
    """The release that a request names. Raises NotFound, also for one that was put away."""
    snapshot = gateway.directory.snapshot
    release = snapshot.find_release(model)
    if release is None and len(model) <= 128 and "\x00" not in model:
        release = await asyncio.to_thread(_find_release, gateway, model)
    if release is None or release.state in (ReleaseState.DISCARDED, ReleaseState.FAILED):
        raise unknown_model(model, snapshot, key.deployments)
    return release


def _find_release(gateway: Gateway, name: str) -> ReleaseView | None:
    with gateway.database.read() as session:
        return load_release(session, name)


async def _route(
    gateway: Gateway,
    caller: Caller,
    model: str,
    pinned: ReleaseView | None,
    earlier: EarlierAnswer | None,
    hold: Hold,
) -> Route:
    """Who answers. From here to the request's end nothing unloads that release."""
    snapshot, allowed = gateway.directory.snapshot, caller.key.deployments
    chosen = route(
        snapshot, model, person_id=caller.person_id, allowed=allowed, earlier=earlier, pinned=pinned
    )
    if chosen.release is None:
        return chosen
    if chosen.arm is Arm.PINNED:
        evaluates = caller.key.allows(Scope.INTERNAL)
        await gateway.pins.pin(chosen.release, hold, tolerate_noise=evaluates)
        gateway.directory.remember(chosen.release.name)
        return chosen
    if earlier is not None and not gateway.chooser.picture.serves(chosen.release):
        # The conversation's release is loaded nowhere: it goes on with another.
        chosen = route(snapshot, model, person_id=caller.person_id, allowed=allowed)
    if chosen.release is not None:
        hold.take(chosen.release)
    return chosen


def _header_value(text: str) -> str:
    """A caller's words as part of a header: nothing in them ends it."""
    if text.isascii() and text.isprintable() and len(text) <= 1024:
        return text
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:1024]


def _exchange(
    gateway: Gateway,
    caller: Caller,
    parsed: Parsed,
    chosen: Route,
    path: str,
    kind: AnswerKind,
    said: MessagesHash,
    earlier: EarlierAnswer | None,
    external_id: str | None,
    number: str,
    root: str,
) -> Exchange:
    release, deployment = chosen.release, chosen.deployment
    is_chat = path == CHAT_PATH
    messages = parsed.messages
    if is_chat and release is not None and deployment is not None:
        messages = with_system_prompt(messages, release.system_prompt, prepend=deployment.prepend)
    sent = engine_body(
        parsed,
        engine_name=chosen.engine_name,
        messages=messages,
        sampling={} if release is None else release.sampling,
        template_kwargs=frozenset() if deployment is None else deployment.template_kwargs,
    )
    # An evaluation asks with people's prompts; what it keeps is figures.
    stored = parsed.given.get("store") is not False and kind is not AnswerKind.INTERNAL
    started = StartedAnswer(
        id=("chatcmpl-" if is_chat else "cmpl-") + number,
        person_id=caller.person_id,
        key_id=caller.key.id,
        deployment=None if deployment is None else deployment.name,
        release=chosen.public_name,
        requested_model=parsed.model,
        arm=chosen.arm,
        propensity=chosen.propensity,
        generation=0 if deployment is None else deployment.generation,
        engine=None,
        gateway=gateway.id,
        kind=kind,
        messages=messages,
        prefix_hash=str(said),
        root_hash=root,
        sampling={k: v for k, v in sent.items() if k not in _NOT_SAMPLING},
        template_hash=gateway.base.template_hash if release is None else release.template_hash,
        tools=sent.get("tools"),
        metadata=parsed.given.get("metadata") or {},
        external_conversation_id=external_id,
        earlier=earlier,
        stored=stored,
        trainable=kind is AnswerKind.CHAT and stored,
    )
    return Exchange(
        path=path,
        body=encode_body(sent, gateway.base.control_tokens),
        request_id=number,
        engine_name=chosen.engine_name,
        public_name=chosen.public_name,
        stream=parsed.stream,
        include_usage=parsed.include_usage,
        n=parsed.n,
        started=started,
        said=said,
    )


_NOT_SAMPLING = frozenset(
    {"model", "messages", "prompt", "tools", "stream", "stream_options", "suffix"}
)
