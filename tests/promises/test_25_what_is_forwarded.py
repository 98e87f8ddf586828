"""Promise 25: an engine is sent the routes and fields of a list, and nothing else.

Each test looks at what the fake engine received.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fake_engine import FakeEngine
from tests.gateway_fixtures import BASE, RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled

pytestmark = pytest.mark.promises

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

#: What may be sent. Written down here once more: a field that is added shall be added twice.
SAMPLING = {
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "seed",
    "logit_bias",
    "logprobs",
    "stream",
    "stream_options",
}
FORWARDED = {
    CHAT: SAMPLING
    | {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "reasoning_effort",
        "chat_template_kwargs",
    },
    TEXT: SAMPLING | {"prompt", "echo", "suffix"},
}
#: Accepted and acted upon; not sent.
OURS = {"metadata", "user", "safety_identifier", "store"}
REFUSED = ("chat_template", "prompt_embeds", "lora_path", "lora_name", "load_inplace")

#: Fields of vLLM's own requests that are not on the list.
OF_THE_ENGINE = (
    "allowed_token_ids",
    "add_generation_prompt",
    "add_special_tokens",
    "best_of",
    "bad_words",
    "cache_salt",
    "continue_final_message",
    "data_parallel_rank",
    "documents",
    "echo",
    "guided_json",
    "ignore_eos",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "length_penalty",
    "logits_processors",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "priority",
    "prompt_logprobs",
    "request_id",
    "return_token_ids",
    "skip_special_tokens",
    "structured_outputs",
    "thinking_token_budget",
    "truncate_prompt_tokens",
    "use_beam_search",
    "vllm_xargs",
)
#: Routes of vLLM 0.32 that the gateway has not, or has with a meaning of its own.
ENGINE_ROUTES = (
    "/invocations",
    "/ping",
    "/health",
    "/version",
    "/load",
    "/server_info",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/generative_scoring",
    "/pause",
    "/resume",
    "/is_paused",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/update_weights",
    "/start_weight_update",
    "/init_weight_transfer_engine",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/abort_requests",
    "/start_profile",
    "/stop_profile",
    "/scale_elastic_ep",
    "/fault_tolerance/apply",
    "/inference/v1/generate",
    "/cohere/v2/chat",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/score",
    "/v1/rerank",
    "/v2/embed",
    "/v2/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/fake/faults",  # the fake engine's own
    "/fake/state",
)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 1000),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 10),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 5),
    "min_tokens": st.integers(0, 5),
    "stop": st.lists(st.text("ab", min_size=1), max_size=4) | st.text("ab", min_size=1),
    "stop_token_ids": st.lists(st.integers(0, 300), max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "2"]), st.floats(-100, 100)),
    "stream": st.booleans(),
    "metadata": st.dictionaries(st.text("ab", max_size=4), st.text("ab")),
    "user": st.text("ab"),
    "safety_identifier": st.text("ab"),
    "store": st.booleans(),
    # of one route only: an unknown field to the other
    "max_completion_tokens": st.integers(1, 5),
    "parallel_tool_calls": st.booleans(),
    "reasoning_effort": st.sampled_from(["low", "high"]),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(["enable_thinking", "thinking", "documents", "custom"]),
        st.booleans() | st.lists(st.integers()),
    ),
    "echo": st.booleans(),
    "suffix": st.text("ab"),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("abc"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(OF_THE_ENGINE) | st.from_regex(r"x_[a-z]{1,8}", fullmatch=True)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A route and a body of known fields, each with a value that it may have, and unknown ones."""
    path = draw(st.sampled_from([CHAT, TEXT]))
    body = draw(st.fixed_dictionaries({}, optional=VALUES))
    unknown = draw(st.dictionaries(NAMES, JSON, max_size=4))
    asked = {"prompt": "Hello"} if path == TEXT else {"messages": [user("Hello")]}
    return path, {**unknown, **body, **asked, "model": draw(st.sampled_from(["assistant", "tiny"]))}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


class Watch:
    """A caller, and what the engine received since it was last asked."""

    def __init__(self, running: RunningGateway, engine: FakeEngine) -> None:
        self.client = running.client(running.key("anna"))
        self._engine = engine

    def ask(self, path: str, body: Any) -> tuple[httpx.Response, list[tuple[str, dict[str, Any]]]]:
        self._engine.requests.clear()
        reply = self.client.post(path, json=body)
        return reply, [(request.path, request.body) for request in self._engine.requests]


@pytest.fixture
def watch(sqlite_gateway: RunningGateway, gateway_engine: FakeEngine) -> Watch:
    return Watch(sqlite_gateway, gateway_engine)


def test_only_listed_fields_are_sent_and_what_is_ignored_is_named(
    watch: Watch, figures: Figures
) -> None:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=scaled(4_000),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(requests())
    def look(asked: tuple[str, dict[str, Any]]) -> None:
        path, body = asked
        reply, received = watch.ask(path, body)
        statuses[reply.status_code] += 1
        assert reply.status_code in (200, 400), reply.text
        assert len(received) == 1 if reply.status_code == 200 else len(received) <= 1
        for sent_to, sent in received:  # of a 400 that is the engine's there is one, too
            assert sent_to == path
            check(path, body, sent)
        if reply.status_code == 200:
            named = reply.headers.get("x-burnish-ignored", "")
            ignored = set(filter(None, named.split(", ")))
            assert ignored == body.keys() - FORWARDED[path] - OURS

    def check(path: str, body: dict[str, Any], sent: dict[str, Any]) -> None:
        assert sent.keys() <= FORWARDED[path]
        assert sent["model"] == BASE.name
        own = ("model", "messages", "stream_options", "chat_template_kwargs")
        for name in sent.keys() - set(own):
            assert sent[name] == body[name], name  # nothing is made up, nothing changed
        kwargs = sent.get("chat_template_kwargs", {})
        assert kwargs.keys() <= {"enable_thinking", "thinking"}
        assert all(isinstance(value, bool) for value in kwargs.values())

    look()
    assert statuses[200] > statuses[400]
    figures(bodies=statuses.total(), answered=statuses[200], fields_too_many=0)


PLACES = {
    "the body": lambda name, value: {name: value},
    "chat_template_kwargs": lambda name, value: {"chat_template_kwargs": {name: value}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_change_the_model_are_refused_by_name(
    watch: Watch, place: str, name: str
) -> None:
    asked = {CHAT: {"messages": [user("Hello")]}, TEXT: {"prompt": "Hello"}}
    values = ["canary", True, 0, None, ["canary"], {"a": "canary"}]
    for path, value in itertools.product(asked, values):
        body = {"model": "assistant", **asked[path], **PLACES[place](name, value)}
        reply, received = watch.ask(path, body)
        if path == TEXT and place == "chat_template_kwargs":
            # A text has no template: the whole field is unknown there.
            assert reply.headers["x-burnish-ignored"] == place
            assert "canary" not in json.dumps(received)
            continue
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == name
        assert received == []


URL = "http://127.0.0.1:9/canary"
MEDIA = [
    {"type": "image_url", "image_url": {"url": URL}},
    {"type": "input_image", "image_url": URL},
    {"type": "image_pil", "image_pil": URL},
    {"type": "image_embeds", "image_embeds": URL},
    {"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}},
    {"type": "audio_url", "audio_url": {"url": URL}},
    {"type": "video_url", "video_url": {"url": URL}},
    {"type": "file", "file": {"file_data": URL}},
    {"image_url": {"url": URL}},  # vLLM guesses a type that is missing
    {"type": None, "image_url": URL},
    {"type": "IMAGE_URL", "image_url": URL},
    {"type": "text", "text": {"url": URL}},
]


def test_media_are_refused(watch: Watch) -> None:
    for part, role in itertools.product(MEDIA, ("system", "user", "assistant", "tool")):
        content = [{"type": "text", "text": "What is this?"}, part]
        message = {"role": role, "content": content, "tool_call_id": "1"}
        body = {"model": "assistant", "messages": [user("Hello"), message, user("And?")]}
        reply, received = watch.ask(CHAT, body)
        assert reply.status_code == 400, (part, role, reply.text)
        assert received == []


HIDDEN = {
    "a message": {"messages": [user("Hello", chat_template="canary", image_url=URL)]},
    "a part": {
        "messages": [user([{"type": "text", "text": "a", "image_url": {"url": URL}, "uuid": URL}])]
    },
    "a part's template": {
        "messages": [user([{"type": "text", "text": "a", "chat_template": "canary"}])]
    },
}


@pytest.mark.parametrize("place", HIDDEN)
def test_nothing_is_hidden_in_a_message(watch: Watch, place: str) -> None:
    reply, received = watch.ask(CHAT, {"model": "assistant", **HIDDEN[place]})
    assert reply.status_code in (200, 400), reply.text
    assert "canary" not in json.dumps(received)


def test_routes_of_the_engine_are_unknown(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine, figures: Figures
) -> None:
    admin = sqlite_gateway.client()
    before = gateway_engine.state()
    gateway_engine.requests.clear()
    bodies = ({}, {"model": "tiny", "prompt": "Hello", "lora_name": "x", "lora_path": "/x"})
    asked = 0
    for path in _spellings(ENGINE_ROUTES):
        for method in ("GET", "POST", "PUT", "DELETE"):
            for body in bodies if method in ("POST", "PUT") else (None,):
                reply = admin.request(method, path, json=body)
                if path.startswith(f"{CHAT}/"):  # of ours: a stored completion of that name
                    assert reply.status_code in (307, 400, 404, 405), (method, path, reply.text)
                else:
                    assert reply.status_code == 404, (method, path, reply.text)
                asked += 1
    assert list(gateway_engine.requests) == []
    assert gateway_engine.state() == before
    figures(requests=asked, routes_of_engines=len(ENGINE_ROUTES), arrived=0)


def _spellings(paths: tuple[str, ...]) -> Iterator[str]:
    for path in paths:
        yield path
        yield f"{path}/"
        yield f"/v1{path}" if not path.startswith("/v1") else path.removeprefix("/v1")
