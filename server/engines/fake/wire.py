"""The bytes of vLLM 0.32: compact JSON, its keys in its order.

Owns: shapes. Pure; tests compare them with a real server's. Does not own: what an answer says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

FINGERPRINT = "vllm-0.32.0-00000000"
_FINGERPRINT = b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
DONE = b"data: [DONE]\n\n"


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
class Answer:
    """One answer that is ready to be written: `choices` are lists of tokens, as text."""

    chat: bool
    id: str
    model: str
    created: int
    choices: Sequence[Sequence[str]]
    prompt_tokens: int
    cut: bool  #: ended by `max_tokens`, not by itself
    prompt_logprobs: Sequence[Sequence[Mapping[str, Any] | None]] | None = None

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

    def closing(self, *, usage: bool) -> list[bytes]:
        """The events after the last token."""
        if not usage:
            return [DONE]
        tail = compact({"usage": self._usage(), "system_fingerprint": FINGERPRINT})[1:]
        return [b"data: {%b,%b\n\n" % (self._prefix() + b'"choices":[]', tail), DONE]

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices; one that ended by itself has one more, which has no text."""
        return sum(len(pieces) + (not self.cut) for pieces in self.choices)

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def _choice(self, index: int) -> dict[str, Any]:
        text, reason = "".join(self.choices[index]), "length" if self.cut else "stop"
        ending = {"finish_reason": reason, "stop_reason": None, "token_ids": None}
        if not self.chat:
            figures = self.prompt_logprobs[index] if self.prompt_logprobs else None
            prompt = {"prompt_logprobs": figures, "prompt_token_ids": None, "routed_experts": None}
            return {"index": index, "text": text, "logprobs": None} | ending | prompt
        message = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
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
        """One token of one choice. `text` needs no escaping: the fake speaks plain words."""
        stop = b'"stop_reason":null,' if reason != b"null" or not self.chat else b""
        if self.chat:
            shape = (
                b'%b%d,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b,%b'
                b'"token_ids":null}]%b}\n\n'
            )
        else:
            shape = (
                b'%b%d,"text":"%b","logprobs":null,"finish_reason":%b,%b'
                b'"prompt_token_ids":null,"token_ids":null}]%b}\n\n'
            )
        return shape % (head, index, text.encode(), reason, stop, fingerprint)
