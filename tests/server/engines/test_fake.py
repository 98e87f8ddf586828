"""What the fake engine has beside vLLM's surface: signatures, slots, faults, an orderly end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from server.engines.base import EngineAddress, EngineRefused, EngineUnreachable
from server.engines.vllm import VllmEngine
from server.processes.engine import free_port
from tests.fake_engine import (
    BASE,
    FakeEngine,
    Faults,
    fake_answer,
    fake_logprobs,
    fake_signature,
)
from tests.fake_engine.instances import build_instance

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "hello"}]
IDS = list(range(40, 60))


@pytest.fixture
async def client(fake_engine: FakeEngine) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(fake_engine.address)
    yield engine
    await engine.close()


async def ask(client: VllmEngine, model: str = "tiny", **more: Any) -> bytes:
    body = json.dumps({"model": model, "messages": MESSAGES, **more}).encode()
    async with client.post(
        "/v1/chat/completions", body, request_id="r", timeout_seconds=10
    ) as reply:
        if reply.status != 200:
            raise EngineRefused(reply.status, (await anext(reply.body)).decode())
        return b"".join([chunk async for chunk in reply.body])


async def text_of(client: VllmEngine, model: str = "tiny") -> str:
    text: str = json.loads(await ask(client, model))["choices"][0]["message"]["content"]
    return text


async def test_answers_and_figures_are_signed_by_the_weights(
    client: VllmEngine, tiny_adapters: list[Path]
) -> None:
    await client.load("a", str(tiny_adapters[0]))
    signature = fake_signature(tiny_adapters[0])
    assert await text_of(client) == fake_answer(BASE, MESSAGES)
    assert await text_of(client, "a") == fake_answer(signature, MESSAGES)
    assert (await text_of(client, "a")).startswith(signature)
    [figures] = await client.prompt_logprobs("a", [IDS])
    assert figures == fake_logprobs(signature, IDS)


async def test_the_least_recently_used_adapter_leaves_memory_and_keeps_its_name(
    fake_engine: FakeEngine, client: VllmEngine, tiny_adapters: list[Path]
) -> None:
    for name, folder in zip("abc", tiny_adapters, strict=False):
        await client.load(name, str(folder))
        await client.touch("a")
    assert fake_engine.slots.in_memory == ["c", "a"]
    assert list(fake_engine.adapters) == ["a", "b", "c"]
    await client.unload("c")  # forgets the name alone
    assert fake_engine.slots.in_memory == ["c", "a"]
    await client.touch("b")
    assert fake_engine.slots.in_memory == ["a", "b"]
    assert fake_engine.slots.loads == 4


async def test_an_evicted_adapter_whose_files_are_gone_kills_the_engine(
    fake_engine: FakeEngine, client: VllmEngine, tiny_adapters: list[Path], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    files = {file: file.read_bytes() for file in tiny_adapters[0].iterdir()}
    for file, content in files.items():
        (gone / file.name).write_bytes(content)
    await client.load("gone", str(gone))
    for name, folder in zip("ab", tiny_adapters[1:], strict=False):
        await client.load(name, str(folder))
    for file in files:
        (gone / file.name).unlink()
    with pytest.raises(EngineRefused, match="EngineCore encountered an issue"):
        await client.touch("gone")
    assert await client.find_fault()
    boot_id = await client.boot_id()
    fake_engine.restart()
    assert await client.find_fault() is None
    assert await client.boot_id() != boot_id
    assert await client.list_models() == {"tiny": "/models/tiny"}


async def test_requests_on_more_adapters_than_run_wait_their_turn(
    fake_engine: FakeEngine, client: VllmEngine, tiny_adapters: list[Path]
) -> None:
    for name, folder in zip("ab", tiny_adapters, strict=False):
        await client.load(name, str(folder))
    fake_engine.faults = Faults(endless=True)
    running = asyncio.create_task(ask(client, "a"))
    await asyncio.to_thread(fake_engine.wait_until, lambda fake: fake.running == 1)
    fake_engine.faults = Faults()
    waiting = asyncio.create_task(text_of(client, "b"))
    await asyncio.to_thread(fake_engine.wait_until, lambda fake: fake.waiting == 1)
    assert await text_of(client) == fake_answer(BASE, MESSAGES)  # the base needs no slot
    running.cancel()
    assert await waiting == fake_answer(fake_signature(tiny_adapters[1]), MESSAGES)
    with suppress(asyncio.CancelledError):
        await running
    assert (fake_engine.aborted, fake_engine.finished) == (1, 2)


@pytest.mark.parametrize(
    ("faults", "own", "base"),
    [
        (Faults(), True, False),
        (Faults(load_does_nothing=True), False, True),
        (Faults(load_wrong_weights=True), False, False),
    ],
)
async def test_a_load_that_lies_is_seen_in_the_figures(
    fake_engine: FakeEngine,
    client: VllmEngine,
    tiny_adapters: list[Path],
    faults: Faults,
    own: bool,
    base: bool,
) -> None:
    fake_engine.faults = faults
    await client.load("a", str(tiny_adapters[0]))
    [figures] = await client.prompt_logprobs("a", [IDS])
    assert (figures == fake_logprobs(fake_signature(tiny_adapters[0]), IDS)) is own
    assert (figures == fake_logprobs(BASE, IDS)) is base


@pytest.mark.parametrize(
    ("faults", "steady"),
    [(Faults(logprob_noise=0.05), False), (Faults(logprob_shift=0.3), True)],
)
async def test_noise_differs_each_time_and_a_quantised_base_errs_the_same_way(
    fake_engine: FakeEngine, client: VllmEngine, faults: Faults, steady: bool
) -> None:
    fake_engine.faults = faults
    first, again = [(await client.prompt_logprobs("tiny", [IDS]))[0] for _ in range(2)]
    errors = [abs(a - b) for a, b in zip(first, fake_logprobs(BASE, IDS), strict=True)]
    assert 0 < max(errors) < 0.4
    assert (first == again) is steady


@pytest.mark.parametrize(
    "faults", [Faults(hangs_up=True), Faults(dies_after_tokens=3), Faults(dies_after_tokens=0)]
)
async def test_an_engine_that_dies_breaks_the_connection(
    fake_engine: FakeEngine, client: VllmEngine, faults: Faults
) -> None:
    fake_engine.faults = faults
    with pytest.raises(EngineUnreachable):
        await ask(client, stream=True)
    assert await client.find_fault() is None


async def test_an_error_in_mid_stream_is_an_event(
    fake_engine: FakeEngine, client: VllmEngine
) -> None:
    fake_engine.faults = Faults(errs_after_tokens=2)
    events = (await ask(client, stream=True)).split(b"\n\n")
    assert json.loads(events[-3].removeprefix(b"data: "))["error"]["code"] == 500
    assert events[-2] == b"data: [DONE]"
    assert sum(b'"content":"' in event for event in events) == 3  # the role, and two tokens


async def test_generated_tokens_are_counted_as_the_usage_has_them(
    fake_engine: FakeEngine, client: VllmEngine
) -> None:
    usage = json.loads(await ask(client, n=3, temperature=1))["usage"]
    assert fake_engine.tokens == usage["completion_tokens"] == 3 * 33
    fake_engine.faults = Faults(token_seconds=0.0001)
    await ask(client, stream=True)
    assert fake_engine.tokens == 4 * 33


FUNCTIONS = [{"type": "function", "function": {"name": name}} for name in ("look", "listen")]
RESULT = [*MESSAGES, {"role": "tool", "tool_call_id": "c", "content": "seen"}]


@pytest.mark.parametrize(
    ("more", "called"),
    [
        ({}, ["look", "listen"]),
        ({"tool_choice": "required", "messages": RESULT}, ["look", "listen"]),
        ({"parallel_tool_calls": False}, ["look"]),
        ({"tool_choice": {"type": "function", "function": {"name": "listen"}}}, ["listen"]),
        ({"tool_choice": "none"}, []),
        ({"messages": RESULT}, []),
    ],
)
async def test_it_calls_every_tool_once_unless_the_request_says_otherwise_or_has_results(
    client: VllmEngine, more: dict[str, Any], called: list[str]
) -> None:
    whole = json.loads(await ask(client, **{"tools": FUNCTIONS, **more}))["choices"][0]["message"]
    events = (await ask(client, **{"tools": FUNCTIONS, **more}, stream=True)).split(b"\n\n")
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events[:-2]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    named = [call["function"]["name"] for call in calls if "id" in call]
    assert [call["function"]["name"] for call in whole.get("tool_calls", ())] == named == called
    assert (whole["content"] or "").startswith(BASE) is (not called)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({}, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'),
        ({"tool_choice": "required"}, 'tool_choice="required" requires --tool-call-parser'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "look"}}},
            'tool_choice=function "look" requires --tool-call-parser',
        ),
    ],
)
async def test_without_a_tool_parser_it_refuses_tools_as_vllm_does(
    fake_engine: FakeEngine, client: VllmEngine, choice: dict[str, Any], words: str
) -> None:
    fake_engine.faults = Faults(lacks_tool_parser=True)
    with pytest.raises(EngineRefused) as refused:
        await ask(client, tools=FUNCTIONS, **choice)
    assert words in json.loads(refused.value.message)["error"]["message"]
    assert await client.parses_tools("tiny") is False
    assert json.loads(await ask(client, tools=FUNCTIONS, tool_choice="none"))["choices"]


async def test_json_is_cut_where_max_tokens_ends_it(client: VllmEngine) -> None:
    more = {"response_format": {"type": "json_object"}}
    [whole] = json.loads(await ask(client, **more))["choices"]
    [cut] = json.loads(await ask(client, **more, max_tokens=2))["choices"]
    assert json.loads(whole["message"]["content"])["answer"].startswith(BASE)
    assert (whole["finish_reason"], cut["finish_reason"]) == ("stop", "length")
    assert whole["message"]["content"].startswith(cut["message"]["content"])


TREE = {"properties": {"left": {"$ref": "#/$defs/Tree"}, "name": {}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("schema", "instance"),
    [
        ({"type": "string"}, "x"),
        ({}, "x"),
        ({"type": ["integer", "null"], "minimum": 3}, 3),
        ({"type": "number"}, 7.5),
        ({"type": "null"}, None),
        ({"const": 5}, 5),
        ({"anyOf": [{"type": "boolean"}, {"type": "string"}]}, True),
        ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2}, ["a", "a"]),
        ({"$ref": "#/$defs/A~1B", "$defs": {"A/B": {"const": 1}}}, 1),
        ({"$ref": "http://elsewhere"}, "x"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, {"a": "x"}),
    ],
)
def test_json_fits_its_schema(schema: dict[str, Any], instance: Any) -> None:
    assert build_instance(schema, "x") == instance


def test_json_of_a_schema_that_contains_itself_ends() -> None:
    tree = build_instance({"$ref": "#/$defs/Tree", "$defs": {"Tree": TREE}}, "x")
    depth = 0
    while "left" in tree:
        assert tree["name"] == "x"
        tree, depth = tree["left"], depth + 1
    assert depth > 3


@pytest.mark.parametrize("faults", [Faults(endless=True), Faults(stalls_after_tokens=1)])
async def test_it_ends_while_clients_wait_and_leaves_no_transport_open(faults: Faults) -> None:
    """An unclosed transport would be a ResourceWarning, which is an error here."""
    with FakeEngine() as fake:
        fake.faults = faults
        client = VllmEngine(fake.address)
        asking = asyncio.create_task(ask(client, stream=True))
        # A client that never reads: what is written to it can't be delivered.
        _, silent = await asyncio.open_connection("127.0.0.1", fake.port, limit=1)
        body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.write(head.encode() + body)
        await asyncio.to_thread(fake.wait_until, lambda fake: fake.running == 2)
        assert await client.find_fault() is None  # an idle connection is open, too
    assert (fake.running, fake.aborted) == (0, 2)
    with pytest.raises(EngineUnreachable):
        await asking
    silent.close()
    with suppress(ConnectionError):
        await silent.wait_closed()
    await client.close()


async def test_as_a_process_it_is_steered_over_http_and_can_be_killed() -> None:
    port = free_port()
    command = [sys.executable, "-P", "-m", "tests.fake_engine", f"--port={port}"]
    process = subprocess.Popen([*command, "--answer-tokens=3"])
    client = VllmEngine(EngineAddress("child", f"http://127.0.0.1:{port}"))
    try:
        async with asyncio.timeout(20):
            while await client.find_fault():
                await asyncio.sleep(0.05)  # another process's start has no event to wait for
        assert await text_of(client) == fake_answer(BASE, MESSAGES, tokens=3)
        sent = json.dumps(asdict(Faults(error_status=503))).encode()
        with urllib.request.urlopen(f"{client.address.url}/fake/faults", data=sent) as reply:
            assert reply.status == 200
        with pytest.raises(EngineRefused) as refused:
            await ask(client)
        assert refused.value.status == 503
        with urllib.request.urlopen(f"{client.address.url}/fake/state") as reply:
            state = json.load(reply)
        assert [request["request_id"] for request in state["requests"]] == ["r", "r"]
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
        await client.close()
    assert await client.find_fault()
    await client.close()
