"""Speaks to one vLLM server over HTTP.

Owns: the wire. Which of vLLM's paths answers which question, how its errors and a broken connection
become `EngineRefused` and `EngineUnreachable`, and that a reply left early closes its connection,
which is what makes vLLM stop generating. Does not own: retries, which engine to ask, or what an
answer means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
from yarl import URL

from server.engines.base import EngineAddress, EngineRefused, EngineUnreachable
from server.engines.connections import (
    CONNECT_SECONDS,
    Connections,
    Posted,
)

HEALTH_SECONDS = 5.0
#: Longest silence on a load, a probe or a touch: they queue behind running generations, which are
#: slow on a CPU.
CALL_SECONDS = 300.0

_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
_SLOTS = re.compile(r'^vllm:lora_requests_info\{[^}]*\bmax_lora="(\d{1,6})"', re.MULTILINE)
_START_TIME = re.compile(r"^process_start_time_seconds (\S+)$", re.MULTILINE)


class VllmEngine:
    """`Engine` over HTTP.

    Takes a `session` to share connections, else opens its own on first use.
    """

    def __init__(
        self, address: EngineAddress, session: aiohttp.ClientSession | None = None
    ) -> None:
        self.address = address
        self.max_loras: int | None = None
        self.max_model_len: int | None = None
        self._session = session
        self._owns_session = session is None
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if address.api_key is not None:
            self._headers["Authorization"] = f"Bearer {address.api_key}"
        self._connections = Connections(address.id, address.url, self._headers)

    async def find_fault(self) -> str | None:
        """None when `/health` answers 200 within `HEALTH_SECONDS`, else why not; never raises.

        Callers read it: it names no address.
        """
        try:
            async with self._open().get(
                self._url("/health"), timeout=aiohttp.ClientTimeout(total=HEALTH_SECONDS)
            ) as response:
                return None if response.status == 200 else f"/health answers {response.status}"
        except TimeoutError:
            return f"/health does not answer within {HEALTH_SECONDS:g} s"
        except aiohttp.ClientConnectorCertificateError as error:
            return f"its certificate is not trusted ({_verification(error.certificate_error)})"
        except aiohttp.ClientConnectorError:
            return "it does not accept connections"
        except _BROKEN as error:
            return f"its health check broke off ({type(error).__name__})"

    async def boot_id(self) -> str:
        """The start time of the server's process, which vLLM exports to 10 ms."""
        status, text = await self._call("GET", "/metrics")
        slots = _SLOTS.search(text)
        self.max_loras = None if slots is None else int(slots[1])
        found = _START_TIME.search(text)
        if found is None:
            raise EngineRefused(
                status, "/metrics has no process_start_time_seconds; Burnish needs one API process"
            )
        return found[1]

    async def list_models(self) -> dict[str, str]:
        """Served names, base and adapters, each with the path it was loaded from."""
        models = await self._call_json("GET", "/v1/models")
        with _expected_shape("/v1/models"):
            for model in models["data"]:
                if model.get("max_model_len") is not None:  # of the base; adapters have none
                    self.max_model_len = int(model["max_model_len"])
            return {model["id"]: model["root"] for model in models["data"]}

    async def load(self, name: str, path: str) -> None:
        """Load the adapter at `path` under `name`.

        A name that is loaded is `EngineRefused` 400, a missing file 404.
        """
        await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload(self, name: str) -> None:
        """Forget `name`; an unknown one is `EngineRefused` 404."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def touch(self, name: str) -> None:
        """Generate one token on `name`."""
        await self._complete(name, [[1]], {})

    async def parses_tools(self, model: str) -> bool:
        """Whether the server was started with a tool parser, for which there is no question.

        So it is asked for what it always refuses, several greedy choices: without a parser it says
        so before it gets to that, and nothing is generated either way. Raises EngineError where it
        says anything else.
        """
        function = {"name": "nothing", "parameters": {"type": "object", "properties": {}}}
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "auto",
            "max_tokens": 1,
            "temperature": 0,
            "n": 2,
        }
        try:
            await self._call("POST", "/v1/chat/completions", body)
        except EngineRefused as refused:
            if refused.status != 400:
                raise
            return "--enable-auto-tool-choice" not in refused.message
        return True

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
        body: dict[str, Any] = {"model": model, "messages": messages}
        if tools:
            body["tools"] = tools
        if variables:
            body["chat_template_kwargs"] = variables
        return await self._tokenize(body)

    async def tokenize_text(self, model: str, text: str) -> list[int]:
        """Token ids of a rendered text; nothing is put before it."""
        return await self._tokenize({"model": model, "prompt": text, "add_special_tokens": False})

    async def _tokenize(self, body: Mapping[str, Any]) -> list[int]:
        answer = await self._call_json("POST", "/tokenize", body)
        with _expected_shape("/tokenize"):
            self.max_model_len = int(answer["max_model_len"])
            return [int(token) for token in answer["tokens"]]

    async def prompt_logprobs(
        self, model: str, prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probability of each prompt's token 1…n-1 given those before it.

        In nats; `(len(prompt) - 1)` each.
        """
        if not prompts:
            return []
        choices = await self._complete(model, prompts, {"prompt_logprobs": 0})
        with _expected_shape("/v1/completions"):
            by_index = {choice["index"]: choice["prompt_logprobs"] for choice in choices}
            return [
                # The first token has no figure. vLLM may list likelier tokens beside the prompt's
                # own.
                [
                    _finite(by_index[i][at][str(prompt[at])]["logprob"])
                    for at in range(1, len(prompt))
                ]
                for i, prompt in enumerate(prompts)
            ]

    def post(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str,
        timeout_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> Posted:
        """Send a JSON body to `path`; the reply's bytes come as they arrive.

        Leaving the context before the end closes the connection: vLLM then aborts the request.
        """
        sent = {**(headers or {}), "X-Request-Id": request_id}
        return self._connections.post(path, body, headers=sent, timeout_seconds=timeout_seconds)

    async def close(self) -> None:
        """Close the connections; not a session that was handed in."""
        self._connections.close()
        if self._owns_session and self._session is not None:
            await self._session.close()
            self._session = None

    async def _complete(
        self, model: str, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The choices: one greedy token after each prompt of token ids.

        Refuses an answer by another model.
        """
        body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, **options}
        answer = await self._call_json("POST", "/v1/completions", body)
        with _expected_shape("/v1/completions"):
            if answer["model"] != model:
                raise EngineRefused(200, f"{answer['model']!r} answered, {model!r} was asked")
            choices: list[dict[str, Any]] = answer["choices"]
            return choices

    async def _call_json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Any:
        status, text = await self._call(method, path, body)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineRefused(status, f"{path} answered something other than JSON") from error

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, str]:
        """Status and text of a whole reply below 400.

        Anything else is `EngineRefused` with vLLM's own message.
        """
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=CALL_SECONDS
        )
        sent = None if body is None else json.dumps(body).encode()
        try:
            async with self._open().request(
                method, self._url(path), data=sent, headers=self._headers, timeout=timeout
            ) as response:
                status = response.status
                text = (await response.read()).decode("utf-8", "replace")
        except _BROKEN as error:
            raise self._unreachable(error) from error
        if status >= 400:
            raise EngineRefused(status, error_message(text))
        return status, text

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # made here because a session belongs to the running event loop
            self._session = aiohttp.ClientSession(
                # Each call has a connection of its own: none meets one that the server closes.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    def _url(self, path: str) -> URL:
        return URL(self.address.url + path, encoded=True)

    def _unreachable(self, error: BaseException) -> EngineUnreachable:
        return self._connections.unreachable(error)


def error_message(text: str) -> str:
    """vLLM's own words out of an error body.

    `{"error": {"message"}}`, `{"error": "…"}`, `{"detail": "…"}` or text.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()[:500]
    match body:
        case (
            {"error": {"message": str(message)}}
            | {"error": str(message)}
            | {"detail": str(message)}
        ):
            return message
    return text.strip()[:500]


def _finite(figure: Any) -> float:
    """A figure that can be compared and summed. ValueError for NaN and infinity."""
    found = float(figure)
    if not math.isfinite(found):
        raise ValueError(f"a log-probability is {found}")
    return found


def _verification(error: Exception) -> str:
    return str(getattr(error, "verify_message", None) or type(error).__name__)


@contextmanager
def _expected_shape(path: str) -> Iterator[None]:
    """Turn a missing key or a wrong type in an answer of `path` into `EngineRefused`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineRefused(200, f"{path} answered in an unknown shape: {error!r}") from error
