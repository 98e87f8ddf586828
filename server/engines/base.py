"""The seam between the gateway and an inference engine.

Owns the words: what an engine can be asked, and how it refuses. `vllm.py` speaks to a vLLM server
over HTTP. One contract suite runs on a real one and on the fake of the tests. Does not own: which
adapters belong on an engine (`conductor.py`) or how its process lives (`processes/engine.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol


class EngineError(Exception):
    """The engine could not do what it was asked."""


class EngineUnreachable(EngineError):
    """No connection, no answer in time, or the connection broke."""


class EngineRefused(EngineError):
    """The engine answered with an error; `status` is its HTTP status, `message` its own words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"engine answered {status}: {message}")
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine listens: `url` without a trailing slash, and the key that opens it."""

    id: str
    url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class EngineReply:
    """An answer that has begun.

    Its bytes come as they arrive, never decoded, never split.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


class Engine(Protocol):
    """One inference server.

    Every method raises `EngineUnreachable` or `EngineRefused`, nothing else.
    """

    address: EngineAddress
    max_loras: int | None
    """Adapter slots, as the server said when its boot id was last asked; None: it has not yet.

    vLLM says it once it has answered something.
    """
    max_model_len: int | None  #: longest sequence in tokens; None before the server said it

    async def find_fault(self) -> str | None:
        """Why the server does not answer its health check; None when it does. Never raises."""

    async def boot_id(self) -> str:
        """Changes whenever the server's process does, and with it everything that was loaded."""

    async def list_models(self) -> dict[str, str]:
        """Served names, base and adapters, each with the path it was loaded from."""

    async def load(self, name: str, path: str) -> None:
        """Load the adapter at `path` (as the engine sees it) under `name`.

        Never replaces weights in place.
        """

    async def unload(self, name: str) -> None:
        """Forget `name`; running requests on it end undisturbed.

        An unknown name is `EngineRefused` 404.
        """

    async def touch(self, name: str) -> None:
        """A one-token request: makes `name` the most recently used adapter."""

    async def parses_tools(self, model: str) -> bool:
        """Whether the server reads calls of tools out of what `model` writes."""

    async def tokenize(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the prompt of `messages` under the served chat template.

        `variables` are the template's, as `chat_template_kwargs` of a request.
        """

    async def tokenize_text(self, model: str, text: str) -> list[int]:
        """Token ids of a rendered text; nothing is put before it."""

    async def prompt_logprobs(
        self, model: str, prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability of each prompt's token 1…n-1 given those before it.

        In nats; `(len(prompt) - 1)` each.
        """

    def post(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        timeout_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[EngineReply]:
        """Send a JSON body to `path`, with further `headers` (of a trace).

        Leaving the context before the end makes the engine stop generating. `timeout_seconds`
        bounds the silence between two reads. Error statuses are replies here, not exceptions.
        """

    async def close(self) -> None:
        """Give back connections."""
