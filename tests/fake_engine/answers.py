"""Answers as vLLM 0.32 writes them: compact JSON, its keys in its order.

Owns: shapes. Pure; tests compare them with a real server's. Does not own: what an answer says.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

FINGERPRINT = "vllm-0.32.0-00000000"
DONE = b"data: [DONE]\n\n"
NOTHING: Mapping[str, Any] = {}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

Forced = Literal["required", "named"] | None
"""What a request says about calls: some function, this function, or nothing."""


def compact(value: Any) -> bytes:
    """JSON as vLLM writes it: no spaces, text unescaped."""
    return _encode(value).encode(errors="surrogatepass")


def error(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """`{"error": {…}}`, whose `code` is the HTTP status as a number."""
    return compact({"error": {"message": message, "type": kind, "param": param, "code": status}})


def model_card(
    name: str, root: str, parent: str | None, max_model_len: int | None, now: int
) -> dict[str, Any]:
    """One entry of `/v1/models`."""
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": now,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function, its arguments token by token."""

    name: str
    pieces: Sequence[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that is ready to be written: `choices` are lists of tokens, as text.

    With `calls` every choice makes these calls and has no text.
    """

    chat: bool
    id: str
    model: str
    created: int
    choices: Sequence[Sequence[str]]
    prompt_tokens: int
    cut: bool  #: ended by `max_tokens`, not by itself
    prompt_logprobs: Sequence[Sequence[Mapping[str, Any] | None]] | None = None
    calls: Sequence[Call] = ()
    forced: Forced = None  #: what the request said about calls

    def whole(self) -> bytes:
        """The reply of a request that doesn't stream."""
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        prompt = {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
        body = {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._choice(index) for index in range(len(self.choices))],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": self._usage() | details,
            **(prompt if self.chat else {}),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        return compact(body)

    def opening(self) -> list[bytes]:
        """The events before the first token: a chat names the role of each choice."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        prompt = {"prompt_token_ids": None, "prompt_text": None}
        return [self._event([_delta(index, delta)], prompt) for index in range(len(self.choices))]

    def steps(self, *, usage_follows: bool, endless: bool = False) -> Iterator[list[bytes]]:
        """One token of every choice at a time; the last carry the finish reason.

        `endless` never gets there.
        """
        closing = {} if usage_follows else {"system_fingerprint": FINGERPRINT}
        indices = range(len(self.choices))
        if self.calls:
            for part in self._parts_of_calls():
                delta = {"content": None, "tool_calls": [part]}
                yield [self._event([_delta(i, delta, token_ids=None)]) for i in indices]
            yield [self._event([_delta(i, {}, **self._ending())], closing) for i in indices]
            return
        tokens = zip(
            *(cycle(pieces) if endless else pieces for pieces in self.choices), strict=True
        )
        last = len(self.choices[0]) - 1 if self.cut and not endless else None
        for at, step in enumerate(tokens):
            yield [
                self._event([self._piece(i, text, ends=at == last)], closing if at == last else {})
                for i, text in enumerate(step)
            ]
        if not self.cut:
            yield [self._event([self._piece(i, "", ends=True)], closing) for i in indices]

    def closing(self, *, usage: bool) -> list[bytes]:
        """The events after the last token."""
        if not usage:
            return [DONE]
        tail = {"usage": self._usage(), "system_fingerprint": FINGERPRINT}
        return [self._event([], tail), DONE]

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices; one that ended by itself has one more, which has no text."""
        called = sum(1 + len(call.pieces) for call in self.calls)
        return sum(len(pieces) + called + (not self.cut) for pieces in self.choices)

    def _reason(self) -> str:
        if self.cut:
            return "length"
        return "tool_calls" if self.calls and self.forced != "named" else "stop"

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def _choice(self, index: int) -> dict[str, Any]:
        text = "".join(self.choices[index])
        ending = self._ending()
        if not self.chat:
            figures = self.prompt_logprobs[index] if self.prompt_logprobs else None
            prompt = {"prompt_logprobs": figures, "prompt_token_ids": None, "routed_experts": None}
            return {"index": index, "text": text, "logprobs": None} | ending | prompt
        message: dict[str, Any] = {
            "role": "assistant",
            # A call that the request wanted leaves an empty text, one that was chosen none.
            "content": None if self.calls and self.forced is None else text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": _call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": "".join(call.pieces)},
                }
                for call in self.calls
            ]
        message["reasoning"] = None
        return (
            {"index": index, "message": message, "logprobs": None}
            | ending
            | {"routed_experts": None}
        )

    def _ending(self) -> dict[str, Any]:
        return {"finish_reason": self._reason(), "stop_reason": None, "token_ids": None}

    def _event(self, choices: list[dict[str, Any]], tail: Mapping[str, Any] = NOTHING) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return b"data: %b\n\n" % compact({**head, "choices": choices, **tail})

    def _piece(self, index: int, text: str, *, ends: bool) -> dict[str, Any]:
        """One token of one choice."""
        ending = self._ending() if ends else {"finish_reason": None, "token_ids": None}
        if self.chat:
            return _delta(index, {"content": text}, **ending)
        ids = {"prompt_token_ids": None, "token_ids": None}
        reason = {"finish_reason": ending["finish_reason"], "stop_reason": None}
        return {"index": index, "text": text, "logprobs": None, **reason, **ids}

    def _parts_of_calls(self) -> Iterator[dict[str, Any]]:
        """For each call its name, then its arguments."""
        for at, call in enumerate(self.calls):
            named = {"type": "function", "index": at, "function": {"name": call.name}}
            yield {"id": _call_id(), **named}
            for piece in call.pieces:
                yield {"index": at, "function": {"arguments": piece}}


def _delta(index: int, delta: Mapping[str, Any], **ending: Any) -> dict[str, Any]:
    """A choice in a chat's event; without `ending` it goes on."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **ending}


def _call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"
