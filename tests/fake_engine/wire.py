"""The bytes of vLLM 0.32: compact JSON, its keys in its order.

Owns: shapes. Pure; tests compare them with a real server's. Does not own: what an answer says.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from json.encoder import encode_basestring
from typing import Any, Literal

FINGERPRINT = "vllm-0.32.0-00000000"
_FINGERPRINT = b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
DONE = b"data: [DONE]\n\n"

Forced = Literal["required", "named"] | None
"""What a request says about calls: some function, this function, or nothing."""


def compact(value: Any) -> bytes:
    """JSON as vLLM writes it: no spaces, text unescaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(
        errors="surrogatepass"
    )


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
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        prompt = b'"prompt_token_ids":null,"prompt_text":null'
        head = self._head()
        return [b"%b%d,%b}],%b}\n\n" % (head, at, delta, prompt) for at in range(len(self.choices))]

    def steps(self, *, usage_follows: bool, endless: bool = False) -> Iterator[list[bytes]]:
        """One token of every choice at a time; the last carry the finish reason.

        `endless` never gets there.
        """
        head, fingerprint = self._head(), b"" if usage_follows else _FINGERPRINT
        if self.calls:
            yield from self._steps_of_calls(head, fingerprint)
            return
        tokens = zip(
            *(cycle(pieces) if endless else pieces for pieces in self.choices), strict=True
        )
        last = len(self.choices[0]) - 1 if self.cut and not endless else None
        for at, step in enumerate(tokens):
            if at == last:
                yield [
                    self._event(head, i, text, b'"length"', fingerprint)
                    for i, text in enumerate(step)
                ]
            else:
                yield [self._event(head, i, text) for i, text in enumerate(step)]
        if not self.cut:
            count = len(self.choices)
            yield [self._event(head, i, "", b'"stop"', fingerprint) for i in range(count)]

    def _steps_of_calls(self, head: bytes, fingerprint: bytes) -> Iterator[list[bytes]]:
        """For each call its name, then its arguments; at last a delta without anything."""
        choices = range(len(self.choices))
        for at, call in enumerate(self.calls):
            named = {"type": "function", "index": at, "function": {"name": call.name}}
            yield [self._event_of_call(head, i, {"id": _call_id(), **named}) for i in choices]
            for piece in call.pieces:
                part = {"index": at, "function": {"arguments": piece}}
                yield [self._event_of_call(head, i, part) for i in choices]
        shape = (
            b'%b%d,"delta":{},"logprobs":null,"finish_reason":"%b","stop_reason":null,'
            b'"token_ids":null}]%b}\n\n'
        )
        yield [shape % (head, i, self._reason().encode(), fingerprint) for i in choices]

    def closing(self, *, usage: bool) -> list[bytes]:
        """The events after the last token."""
        if not usage:
            return [DONE]
        tail = compact({"usage": self._usage(), "system_fingerprint": FINGERPRINT})[1:]
        return [b"data: {%b,%b\n\n" % (self._prefix() + b'"choices":[]', tail), DONE]

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
        ending = {"finish_reason": self._reason(), "stop_reason": None, "token_ids": None}
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

    def _prefix(self) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return compact(head)[1:-1] + b","

    def _head(self) -> bytes:
        """An event as far as its choice's index."""
        return b'data: {%b"choices":[{"index":' % self._prefix()

    def _event(
        self, head: bytes, index: int, text: str, reason: bytes = b"null", fingerprint: bytes = b""
    ) -> bytes:
        """One token of one choice."""
        stop = b'"stop_reason":null,' if reason != b"null" or not self.chat else b""
        if self.chat:
            shape = (
                b'%b%d,"delta":{"content":%b},"logprobs":null,"finish_reason":%b,%b'
                b'"token_ids":null}]%b}\n\n'
            )
        else:
            shape = (
                b'%b%d,"text":%b,"logprobs":null,"finish_reason":%b,%b'
                b'"prompt_token_ids":null,"token_ids":null}]%b}\n\n'
            )
        return shape % (head, index, encode_basestring(text).encode(), reason, stop, fingerprint)

    def _event_of_call(self, head: bytes, index: int, part: Mapping[str, Any]) -> bytes:
        """A part of one call of one choice."""
        delta = compact({"content": None, "tool_calls": [part]})
        shape = b'%b%d,"delta":%b,"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        return shape % (head, index, delta)


def _call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"
