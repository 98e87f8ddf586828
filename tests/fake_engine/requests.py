"""What a generation request asks of the fake engine.

Owns: reading a request body, vLLM's refusals of one, and the answer that follows from it and a
signature. Does not own: which weights answer, and when.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.fake_engine.answers import Answer, Call, Forced, compact, error
from tests.fake_engine.instances import build_instance
from tests.fake_engine.weights import answer_pieces, fake_tokens

COMPLETION_TOKENS = 16  #: what /v1/completions makes where `max_tokens` is not given
JSON_OBJECT: Mapping[str, Any] = {"properties": {"answer": {"type": "string"}}}
"""What an answer in JSON is like where no schema says it."""

#: Figures of a prompt under a signature: `(signature, ids) -> (len(ids) - 1)`, nats.
Figures = Callable[[str, Sequence[int]], list[float]]


class Refusal(Exception):
    """An error reply."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reply = error(status, message, kind, param)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A body of `/v1/chat/completions` or `/v1/completions`, checked."""

    chat: bool
    id: str
    model: str
    prompts: Sequence[Any]  #: each a list of messages, a text, or token ids
    token_ids: Sequence[Sequence[int]]  #: the same, as tokens
    choices: int  #: for each prompt
    tokens: int  #: length of an answer
    cut: bool  #: that length is the request's wish
    stream: bool
    usage: bool  #: a last event with the usage was asked for
    wants_figures: bool
    schema: Mapping[str, Any] | None  #: of an answer in JSON
    tools: Sequence[Mapping[str, Any]]  #: the functions that are called instead of an answer
    forced: Forced  #: how far the request says so

    def answer(self, signature: str, figures: Figures) -> Answer:
        """What the weights of `signature` say."""
        every = [(prompt, ids) for prompt, ids in zip(self.prompts, self.token_ids, strict=True)]
        said = "".join(answer_pieces(signature, self.prompts[0], 0, 3))
        choices = [
            answer_pieces(signature, prompt, index, self.tokens)
            for prompt, _ in every
            for index in range(self.choices)
        ]
        cut, calls = self.cut, [_call(function, said) for function in self.tools]
        if calls:
            cut, choices = False, [[] for _ in choices]
        elif self.schema is not None:
            pieces = _json_pieces(self.schema, said)
            cut = cut and len(pieces) > self.tokens
            choices = [pieces[: self.tokens] if cut else pieces for _ in choices]
        return Answer(
            chat=self.chat,
            id=self.id,
            model=self.model,
            created=int(time.time()),
            choices=choices,
            prompt_tokens=sum(map(len, self.token_ids)),
            cut=cut,
            calls=calls,
            forced=self.forced,
            prompt_logprobs=[
                _prompt_logprobs(ids, figures(signature, ids))
                for _, ids in every
                for _ in range(self.choices)
            ]
            if self.wants_figures
            else None,
        )


def read_request(
    body: dict[str, Any],
    *,
    chat: bool,
    request_id: str | None,
    model: str,
    answer_tokens: int,
    max_model_len: int,
    default_system: str | None = None,
) -> GenerationRequest:
    """Check a body as vLLM does. Raises `Refusal`."""
    prompts = [body.get("messages")] if chat else _prompts(body.get("prompt"))
    if chat and not isinstance(prompts[0], list):
        kind, field = "Bad Request", "body.messages"
        raise Refusal(400, "1 validation error:\n  'body.messages': Field required", kind, field)
    if chat and not prompts[0]:
        message = (
            "Cannot apply chat template to an empty conversation. Provide at least one message."
        )
        raise Refusal(400, message, "BadRequestError")
    token_ids = [_token_ids(prompt, default_system) for prompt in prompts]
    if not all(token_ids):
        raise Refusal(400, "The decoder prompt cannot be empty", "BadRequestError")
    longest = max(map(len, token_ids))
    if longest > max_model_len:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains at least {longest} input tokens, which exceeds this limit even without any "
            "output tokens. Please reduce the length of the input prompt. "
            f"(parameter=input_tokens, value={longest})"
        )
        raise Refusal(400, message, "BadRequestError", "input_tokens")
    choices = body.get("n") or 1
    if choices > 1 and body.get("temperature") == 0:
        message = f"n must be 1 when using greedy sampling, got {choices}."
        raise Refusal(400, message, "BadRequestError")
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if limit is not None and limit > max_model_len:
        field = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
        message = (
            f"{field}={limit} cannot be greater than max_model_len={max_model_len}. "
            f"Please request fewer output tokens. (parameter={field}, value={limit})"
        )
        raise Refusal(400, message, "BadRequestError", field)
    if limit is None and not chat:
        limit = COMPLETION_TOKENS
    tools, forced = _chosen_tools(body) if chat else ([], None)
    return GenerationRequest(
        chat=chat,
        id=("chatcmpl-" if chat else "cmpl-") + (request_id or uuid.uuid4().hex[:16]),
        model=model,
        prompts=prompts,
        token_ids=token_ids,
        choices=choices,
        tokens=limit or answer_tokens,
        cut=limit is not None,
        stream=bool(body.get("stream")),
        usage=bool((body.get("stream_options") or {}).get("include_usage")),
        wants_figures=body.get("prompt_logprobs") is not None,
        schema=_schema(body.get("response_format")) if chat else None,
        tools=tools,
        forced=forced,
    )


def refuse_tools(body: Mapping[str, Any]) -> None:
    """Refuse a request with tools as a server without a tool parser does."""
    choice = body.get("tool_choice") or "auto"
    if not body.get("tools") or choice == "none":
        return
    if choice == "auto":
        message = (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        )
    else:
        function = choice["function"] if isinstance(choice, Mapping) else None
        demand = f'"{choice}"' if function is None else f'function "{function["name"]}"'
        message = f"tool_choice={demand} requires --tool-call-parser to be set"
    raise Refusal(400, message, "BadRequestError")


def _chosen_tools(body: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Forced]:
    """The functions that the answer calls, and how far the request said so.

    Left to itself, the fake calls each of them once, and answers in words when results are there.
    """
    functions = [tool["function"] for tool in body.get("tools") or ()]
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, Mapping):
        name = choice["function"]["name"]
        found = [function for function in functions if function["name"] == name]
        if not found:
            message = (
                "The tool specified in `tool_choice` does not match any of the specified `tools` "
                "(parameter=tool_choice)"
            )
            raise Refusal(400, message, "BadRequestError", "tool_choice")
        return found, "named"
    if choice == "none" or (choice == "auto" and body["messages"][-1].get("role") == "tool"):
        return [], None
    chosen = functions[:1] if body.get("parallel_tool_calls") is False else functions
    return chosen, "required" if choice == "required" else None


def _schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What the answer has to be, where a format asks for JSON."""
    kind = (response_format or {}).get("type")
    if response_format is None or kind not in ("json_schema", "json_object"):
        return None
    return JSON_OBJECT if kind == "json_object" else response_format["json_schema"]["schema"]


def _call(function: Mapping[str, Any], text: str) -> Call:
    schema = function.get("parameters") or {"type": "object"}
    return Call(function["name"], _json_pieces(schema, text))


def _json_pieces(schema: Mapping[str, Any], text: str) -> list[str]:
    """An instance of the schema, four characters a token."""
    said = compact(build_instance(schema, text)).decode()
    return [said[at : at + 4] for at in range(0, len(said), 4)]


def _prompts(prompt: Any) -> list[Any]:
    """The prompts of `/v1/completions`: one text, one list of ids, or a list of either."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    return [prompt]


def _token_ids(prompt: Any, default_system: str | None) -> list[int]:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return fake_tokens(prompt, default_system=default_system)
    return prompt if isinstance(prompt, list) else list(str(prompt or "").encode())


def _prompt_logprobs(ids: Sequence[int], figures: Sequence[float]) -> list[dict[str, Any] | None]:
    """vLLM's shape: nothing for the first token, then the token's own figure under its id."""
    rest = zip(ids[1:], figures, strict=True)
    return [
        None,
        *(
            {str(token): {"logprob": figure, "rank": 1, "decoded_token": chr(token % 128)}}
            for token, figure in rest
        ),
    ]
