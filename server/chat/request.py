"""Request bodies of chat and text completions: fields that pass, are ignored, or are refused.

Owns: the three lists and the checks. Does not own: who may call what (`access/`), which release
answers (`routing.py`), what the engine is sent (`engine_request.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from feedback.answers import OURS, text_of
from feedback.errors import BadRequest
from feedback.numbers import whole, whole_fields
from server.errors import describe_field
from server.http.bodies import WITHOUT_NUL

Request = TypeVar("Request", bound="Sampling")


Bounded = Annotated[float, Field(ge=-2, le=2)]


Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64, pattern=WITHOUT_NUL)],
        Annotated[str, Field(max_length=512, pattern=WITHOUT_NUL)],
    ],
    Field(max_length=16),
]


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: StrictBool | None = None


class Sampling(BaseModel):
    """Fields of both routes that the engine is given as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Bounded | None = None
    frequency_penalty: Bounded | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    # ours: never forwarded
    metadata: Metadata | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    store: StrictBool | None = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=2048)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TextRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str,
        Field(min_length=1, description="One text; a list of one is taken for it."),
    ]
    echo: StrictBool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


REFUSED = {
    "chat_template": "the chat template is the deployment's; a request cannot bring its own",
    "prompt_embeds": "embeddings as a prompt are not accepted",
    "lora_path": "adapters are named by releases, such as 'assistant@3'",
    "lora_name": "adapters are named by releases, such as 'assistant@3'",
    "load_inplace": "adapters are named by releases, such as 'assistant@3'",
}
"""Refused wherever they stand in the body's upper levels, by name."""


_MESSAGE_FIELDS = frozenset(
    {
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "refusal",
        "reasoning",
        "reasoning_content",
    }
)


_PART_FIELDS = frozenset({"type", "text", "refusal"})
"""Of a message and of its parts the engine gets these; others are named as ignored."""


_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


_MEDIA = frozenset(
    {"image_url", "input_image", "image", "input_audio", "audio_url", "video_url", "file"}
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A checked request.

    `given` is the body as sent, `ignored` the names of fields that have no effect.
    """

    given: dict[str, Any]
    model: str
    stream: bool
    include_usage: bool
    n: int
    ignored: tuple[str, ...]
    messages: list[
        dict[str, Any]
    ]  #: the caller's; of a text completion one pseudo message of role `prompt`


def parse_chat(body: dict[str, Any], *, max_choices: int, strict: bool) -> Parsed:
    """Check a chat request.

    Raises BadRequest naming the field, what was found and what is expected.
    """
    _refuse(body)
    _refuse(body.get("chat_template_kwargs"))
    request = _validate(ChatRequest, body)
    ignored: list[str] = []
    for index, message in enumerate(request.messages):
        _check_message(index, message)
        if not message.keys() <= _MESSAGE_FIELDS or isinstance(message.get("content"), list):
            ignored += _drop_unknown(index, message)
    return _parsed(body, request, request.messages, ignored, max_choices=max_choices, strict=strict)


def parse_text(body: dict[str, Any], *, max_choices: int, strict: bool) -> Parsed:
    """Check a text completion's request."""
    _refuse(body)
    if isinstance(body.get("prompt"), list):
        body["prompt"] = _only_text(body["prompt"])
    request = _validate(TextRequest, body)
    prompt = [{"role": "prompt", "content": request.prompt}]
    return _parsed(body, request, prompt, [], max_choices=max_choices, strict=strict)


def _parsed(
    body: dict[str, Any],
    request: Sampling,
    messages: list[dict[str, Any]],
    ignored_within: list[str],
    *,
    max_choices: int,
    strict: bool,
) -> Parsed:
    if request.n is not None and request.n > max_choices:
        raise BadRequest(f"n is {request.n}, at most {max_choices} are accepted", param="n")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options goes with stream: true", param="stream_options")
    ignored = (*sorted(request.model_extra or ()), *ignored_within)
    if ignored and strict:
        raise BadRequest(
            f"unknown or unsupported field {ignored[0]!r}; this gateway is strict", param=ignored[0]
        )
    options = request.stream_options
    return Parsed(
        given=body,
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(options is not None and options.include_usage),
        n=request.n or 1,
        ignored=ignored,
        messages=messages,
    )


def _only_text(prompts: list[Any]) -> str:
    """The one text of a list: older clients always send one."""
    if len(prompts) == 1 and isinstance(prompts[0], str):
        return prompts[0]
    if all(isinstance(prompt, str) for prompt in prompts):
        found = f"{len(prompts)} texts"
    else:
        found = "a list of token ids, or of something else"
    raise BadRequest(
        f"prompt is {found}; expected one text: send each in a request of its own, as text",
        param="prompt",
    )


def _validate(kind: type[Request], body: dict[str, Any]) -> Request:
    for name in whole_fields(kind) & body.keys():
        body[name] = whole(body[name])  # the engine is given it so, too
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"][:1])
        found = "" if first["type"] == "missing" else f" (found {str(first['input'])[:80]!r})"
        said = describe_field(first, param)
        raise BadRequest(f"{param}: {said}{found}", param=param) from None


def _refuse(body: Any) -> None:
    if isinstance(body, dict):
        for name in sorted(REFUSED.keys() & body.keys()):
            raise BadRequest(f"{name!r} is refused: {REFUSED[name]}", param=name)


def _check_message(index: int, message: dict[str, Any]) -> None:
    message.pop(OURS, None)  # only the gateway marks messages
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequest(
            f"{where}.role is {str(role)[:80]!r}, expected one of {', '.join(sorted(_ROLES))}",
            param=where,
        )
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            _check_part(where, part)
    elif content is None:
        if role != "assistant":
            raise BadRequest(f"{where}.content is missing, expected a string", param=where)
    elif not isinstance(content, str):
        raise BadRequest(
            f"{where}.content is {type(content).__name__}, "
            "expected a string or a list of text parts",
            param=where,
        )
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(_is_tool_call, calls))):
        raise BadRequest(
            f"{where}.tool_calls must be a list of objects, each with a 'function' that has a "
            "'name' and 'arguments', both strings",
            param=where,
        )


def _drop_unknown(index: int, message: dict[str, Any]) -> list[str]:
    """Leave in a message what the engine is to get; the names of what went."""
    where = f"messages[{index}]"
    dropped = [f"{where}.{name}" for name in message if name not in _MESSAGE_FIELDS]
    for name in message.keys() - _MESSAGE_FIELDS:
        del message[name]
    content = message.get("content")
    if isinstance(content, list):
        for at, part in enumerate(content):
            dropped += [
                f"{where}.content[{at}].{name}" for name in part if name not in _PART_FIELDS
            ]
        message["content"] = [
            {name: value for name, value in part.items() if name in _PART_FIELDS}
            for part in content
        ]
    return dropped


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise BadRequest(f"{where} has a part without a type, expected 'text'", param=where)
    if kind in _MEDIA:
        raise BadRequest(
            f"{where} has a part of type {kind!r}; this model reads text only", param=where
        )
    if kind not in ("text", "refusal"):
        raise BadRequest(f"{where} has a part of type {kind[:80]!r}, expected 'text'", param=where)
    if not isinstance(part.get(kind), str):
        raise BadRequest(f"{where} has a {kind} part without a string in {kind!r}", param=where)


def is_task(parsed: Parsed, prefixes: Sequence[str]) -> bool:
    """Whether a chat is a front end's own call, such as for a title.

    It says so (`metadata.task`), or its one user message, with nothing but system messages beside
    it, begins as such calls do.
    """
    if (parsed.given.get("metadata") or {}).get("task"):
        return True
    turns = [m for m in parsed.messages if m.get("role") not in ("system", "developer")]
    if len(turns) != 1 or turns[0].get("role") != "user":
        return False
    return text_of(turns[0].get("content")).lstrip().startswith(tuple(prefixes))


def offers_tools(parsed: Parsed) -> bool:
    """Whether the answer may be calls of tools, which takes a parser."""
    return bool(parsed.given.get("tools")) and parsed.given.get("tool_choice") != "none"


def check_tools(parsed: Parsed, parses_tools: bool | None, *, strict: bool) -> Parsed:
    """The request as an engine can take it, which may call tools or not (None: unknown).

    `tool_choice: auto` leaves it to the model whether it calls any, so where no engine can, the
    tools go and are named as ignored; a choice that demands a call is BadRequest. A choice among no
    tools, as clients that write every field send it, goes unnamed: it asks for nothing.
    """
    given = parsed.given
    choice = given.get("tool_choice")
    demands_a_call = choice not in (None, "auto", "none")
    sent = [name for name in _OF_TOOLS if given.get(name) is not None]
    if not given.get("tools"):
        if demands_a_call:
            raise BadRequest("tool_choice demands a call, and there are no tools", param="tools")
        return _without(parsed, sent) if sent else parsed
    if parses_tools is not False or not offers_tools(parsed):
        return parsed
    if demands_a_call or strict:
        raise BadRequest(
            "the engine runs without a tool parser, so it can't call tools; set engine.tool_parser "
            "to vLLM's for this model, or "
            + ("send tool_choice 'auto' or 'none'" if demands_a_call else "leave the tools out"),
            param="tool_choice" if demands_a_call else "tools",
        )
    return _without(parsed, sent, ignored=(*parsed.ignored, *sent))


_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")


def _without(
    parsed: Parsed, names: Sequence[str], ignored: tuple[str, ...] | None = None
) -> Parsed:
    given = {name: value for name, value in parsed.given.items() if name not in names}
    return replace(parsed, given=given, ignored=parsed.ignored if ignored is None else ignored)


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and all(
        isinstance(function.get(name), str) for name in ("name", "arguments")
    )
