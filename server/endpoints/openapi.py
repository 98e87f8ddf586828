"""The API's description at `/openapi.json`: what FastAPI derives from the routes, completed.

Owns: which errors a route can give, the one shape of them all, who may call what, and the replies
of the two completion routes, which build theirs by hand. Does not own: the shapes of other replies
(`server/views`) and of bodies, which stand beside their routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from server.access.scopes import ROUTES, Scope
from server.endpoints.chat import CHAT_PATH, TEXT_PATH
from server.http.idempotency import HEADER, REPLAYED_HEADER, takes_key
from server.http.replies import IGNORED_HEADER

Operation = dict[str, Any]

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
_FROM_FASTAPI = ("HTTPValidationError", "ValidationError")  # an error of ours is never of this form


class ErrorObject(TypedDict):
    """What was wrong, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """OpenAI's envelope: every failed request is answered with it."""

    error: ErrorObject


class ChatMessage(TypedDict, total=False):
    """What the model said; further fields are the engine's."""

    role: str
    content: str | None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    finish_reason: str | None


class TextChoice(TypedDict):
    index: int
    text: str
    finish_reason: str | None


class Usage(TypedDict):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class ChatCompletion(TypedDict):
    """OpenAI's object as the engine made it, `model` being the release that answered."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextCompletion(TypedDict):
    """OpenAI's object as the engine made it, `model` being the release that answered."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


_COMPLETIONS = {CHAT_PATH: ChatCompletion, TEXT_PATH: TextCompletion}

_STATUSES = {
    400: "The request cannot be understood, or breaks a rule.",
    401: "No key, or one that is unknown or was revoked.",
    403: "The key lacks a scope, or is limited to some deployments.",
    404: "Unknown, or somebody else's: the two are not told apart.",
    408: "Headers or body did not come in time.",
    409: "The state is not what the request supposes.",
    413: "The body is too large.",
    415: "The body's content-encoding is not read here; `accept-encoding` lists those that are.",
    429: "A limit of the key is used up.",
    431: "Request line and headers are too long.",
    500: "A fault of ours; the log has it.",
    502: "The engine failed.",
    503: "Not ready; try again.",
}
_RETRY_AFTER = (429, 503)

_PART = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"type": "string", "enum": ["text", "refusal"]},
        "text": {"type": "string"},
        "refusal": {"type": "string"},
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {
            "type": "string",
            "enum": ["system", "developer", "user", "assistant", "tool", "function"],
        },
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}],
            "description": "Text, or parts of text. An assistant's may be null.",
        },
    },
}
_EVENT = {
    "type": "object",
    "description": "One event of the stream.",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "description": 'A chunk as JSON, `{"error": …}` where the answer broke, or `[DONE]`.',
        }
    },
}
_COMPLETION_HEADERS = {
    "x-request-id": "The completion's id without its prefix.",
    "x-burnish-release": "The release that answered.",
    "x-burnish-stored": "`true` when the answer is kept.",
}


class DescribedApi(FastAPI):
    """FastAPI with the whole description."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = describe(super().openapi())
        return self.openapi_schema


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with errors, keys, and the replies of the completion routes."""
    components = document["components"]
    schemas = components["schemas"]
    for name in _FROM_FASTAPI:
        schemas.pop(name, None)
    schemas |= _schemas_of(ErrorReply, *_COMPLETIONS.values())
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "`sk-burnish-…`; for feedback on one answer also a feedback token.",
        }
    }
    scopes = {(method, path.replace(":path", "")): s for (method, path), s in ROUTES.items()}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, method.upper(), path, scopes.get((method.upper(), path)))
    return document


def _complete(operation: Operation, method: str, path: str, scope: Scope | None) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path in _COMPLETIONS and method == "POST":
        responses["200"] = _completion_reply(_COMPLETIONS[path].__name__)
        fields = operation["requestBody"]["content"][_JSON]["schema"]["properties"]
        if "messages" in fields:
            fields["messages"]["items"] = _MESSAGE
    if scope is not None:
        operation["security"] = [{"key": []}]
    if scope is not None and takes_key(method, path):
        operation.setdefault("parameters", []).append(_IDEMPOTENCY_KEY)
        for status, response in responses.items():
            if status.startswith("2"):
                response.setdefault("headers", {})[REPLAYED_HEADER] = _header(
                    "`true` on a reply that was kept for this `Idempotency-Key`."
                )
    for status in list_errors(operation, method, path, is_public=scope is None):
        if str(status) not in responses:
            responses[str(status)] = _error_reply(status, scope)
    for response in responses.values():
        response.setdefault("headers", {}).setdefault(
            "x-request-id", _header("The request's id, which stands in the log.")
        )
    operation["responses"] = dict(sorted(responses.items()))


def list_errors(
    operation: Mapping[str, Any], method: str, path: str, *, is_public: bool
) -> Iterable[int]:
    """The statuses of failure that an operation can answer with."""
    yield from (408, 431, 500)
    if is_public:
        return
    yield from (400, 401, 403, 429, 503)
    has_body = "requestBody" in operation
    if has_body or operation.get("parameters"):
        yield 404
    if method != "GET":
        yield 409
    if has_body:
        yield from (413, 415)
    if path in _COMPLETIONS and method == "POST":
        yield 502


_IDEMPOTENCY_KEY = {
    "name": HEADER,
    "in": "header",
    "description": "The same request under the same key runs once; its reply is kept for a day.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}


def _error_reply(status: int, scope: Scope | None) -> dict[str, Any]:
    text = _STATUSES[status]
    if status == 403 and scope is not None:
        text += f" It needs the scope `{scope}`."
    reply: dict[str, Any] = {
        "description": text,
        "content": {_JSON: {"schema": {"$ref": _REF.format(model="ErrorReply")}}},
    }
    if status in _RETRY_AFTER:
        reply["headers"] = {"retry-after": _header("Seconds to wait.", kind="integer")}
    if status == 401:
        reply["headers"] = {"www-authenticate": _header("`Bearer`")}
    return reply


def _completion_reply(model: str) -> dict[str, Any]:
    return {
        "description": "The answer; with `stream: true` as events that end with `data: [DONE]`.",
        "headers": {
            **{name: _header(text, required=True) for name, text in _COMPLETION_HEADERS.items()},
            IGNORED_HEADER: _header("Fields of the request that had no effect."),
        },
        "content": {
            _JSON: {"schema": {"$ref": _REF.format(model=model)}},
            "text/event-stream": {"schema": _EVENT},
        },
    }


def _header(text: str, *, kind: str = "string", required: bool = False) -> dict[str, Any]:
    return {"description": text, "required": required, "schema": {"type": kind}}


def _schemas_of(*shapes: type) -> dict[str, Any]:
    """Each shape and what it refers to, by name."""
    found: dict[str, Any] = {}
    for shape in shapes:
        schema = TypeAdapter(shape).json_schema(ref_template=_REF, mode="serialization")
        found |= schema.pop("$defs", {})
        found[shape.__name__] = schema
    return found
