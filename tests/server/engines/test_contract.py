"""One contract, kept by a real vLLM and by the fake: `VllmEngine` sees the same from both."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tokenizers import pre_tokenizers

from server.engines.base import EngineAddress, EngineRefused
from server.engines.same_prompt import SamePrompt
from server.engines.vllm import VllmEngine
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import BASE
from tests.tiny_model import CHAT_TEMPLATE, DEFAULT_SYSTEM, SPECIAL_TOKENS
from tuner.chat_template import ChatTemplate

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Name three trees."}]
#: Longer than vLLM's cache block on a CPU (128 tokens): its beginning is answered from the cache.
LONG = [{"role": "user", "content": "Name three trees. " * 15}]
PROMPT_IDS = [list(range(40, 52)), list(range(60, 85))]

Load = Callable[[Path], Awaitable[str]]
_numbers = itertools.count()


@pytest.fixture(
    params=[
        "fake",
        pytest.param("vllm", marks=[pytest.mark.engine, pytest.mark.xdist_group("engine")]),
    ]
)
def address(request: pytest.FixtureRequest) -> EngineAddress:
    """Where the engine listens: base `tiny`, one adapter runs at a time, two are in memory."""
    if request.param == "vllm":
        real: EngineAddress = request.getfixturevalue("real_engine")
        return real
    fake: FakeEngine = request.getfixturevalue("fake_engine")
    fake.faults = Faults(token_seconds=0.002)
    return fake.address


@pytest.fixture
async def engine(address: EngineAddress) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(address)
    yield engine
    await engine.close()


@pytest.fixture
async def load(engine: VllmEngine) -> AsyncIterator[Load]:
    """Loads a folder under a name that was never used; forgets it after the test."""
    names = []

    async def load_folder(folder: Path) -> str:
        name = f"adapter-{next(_numbers)}"
        await engine.load(name, str(folder))
        names.append(name)
        return name

    yield load_folder
    for name in names:
        if name in await engine.list_models():
            await engine.unload(name)


async def ask(
    engine: VllmEngine, body: dict[str, Any], path: str = "/v1/chat/completions", id: str = "r1"
) -> tuple[int, bytes]:
    async with engine.post(
        path, json.dumps(body).encode(), request_id=id, timeout_seconds=60
    ) as reply:
        return reply.status, b"".join([chunk async for chunk in reply.body])


def chat(model: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": MESSAGES,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        **more,
    }


async def text_of(
    engine: VllmEngine, model: str, tokens: int, messages: list[dict[str, str]] = MESSAGES
) -> str:
    status, body = await ask(engine, chat(model, tokens, messages=messages))
    assert status == 200, body
    text: str = json.loads(body)["choices"][0]["message"]["content"]
    return text


def masked(body: bytes) -> str:
    """The bytes with what differs from answer to answer blotted out."""
    text = re.sub(r'"created":\d+', '"created":0', body.decode())
    text = re.sub(r'"system_fingerprint":"vllm-[^"]+"', '"system_fingerprint":"F"', text)
    text = re.sub(r'"id":"modelperm-[^"]+"', '"id":"modelperm-0"', text)
    text = re.sub(r'"content":"(?:[^"\\]|\\.)+"', '"content":"…"', text)
    text = re.sub(r'"id":"chatcmpl-tool-[0-9a-f]{16}"', '"id":"chatcmpl-tool-0"', text)
    # A token that is no whole character has no text yet.
    return re.sub(r'"text":"(?:[^"\\]|\\.)*"', '"text":"…"', text)


async def test_health_boot_id_and_base(engine: VllmEngine) -> None:
    assert await engine.find_fault() is None
    assert await engine.boot_id() == await engine.boot_id()
    assert next(iter(await engine.list_models())) == "tiny"


async def test_slots_are_told_once_it_has_answered(engine: VllmEngine) -> None:
    await engine.touch("tiny")
    await engine.boot_id()
    assert engine.max_loras == 1


async def test_an_adapter_is_listed_with_its_path_until_it_is_unloaded(
    engine: VllmEngine, tiny_adapters: list[Path]
) -> None:
    await engine.load("listed", str(tiny_adapters[0]))
    assert (await engine.list_models())["listed"] == str(tiny_adapters[0])
    await engine.unload("listed")
    assert "listed" not in await engine.list_models()


async def test_refusals_carry_the_engines_status_and_words(
    engine: VllmEngine,
    address: EngineAddress,
    load: Load,
    tiny_adapters: list[Path],
    tmp_path: Path,
) -> None:
    name = await load(tiny_adapters[0])
    stranger = VllmEngine(EngineAddress("stranger", address.url, "wrong"))
    table: list[tuple[Callable[[], Awaitable[Any]], int, str]] = [
        (lambda: engine.unload("nobody"), 404, "The lora adapter 'nobody' cannot be found."),
        (lambda: engine.load(name, str(tiny_adapters[0])), 400, "has already been loaded"),
        (lambda: engine.load("gone", str(tmp_path)), 404, "No adapter found for <path>"),
        (lambda: engine.load("tiny", str(tmp_path)), 400, "conflicts with a served base model"),
        (lambda: engine.touch("nobody"), 404, "The model `nobody` does not exist."),
        (lambda: engine.prompt_logprobs("nobody", [[1, 2]]), 404, "does not exist"),
        (lambda: engine.prompt_logprobs("tiny", [[]]), 400, "prompt cannot be empty"),
        (lambda: engine.tokenize("nobody", MESSAGES), 404, "does not exist"),
        (stranger.list_models, 401, "Unauthorized"),
    ]
    for call, status, words in table:
        with pytest.raises(EngineRefused) as refused:
            await call()
        assert refused.value.status == status, refused.value
        assert words in refused.value.message
    await stranger.close()


async def test_error_replies_are_passed_through_byte_by_byte(engine: VllmEngine) -> None:
    path = "/v1/chat/completions"
    assert await ask(engine, chat("nobody", 2), path) == (
        404,
        b'{"error":{"message":"The model `nobody` does not exist. Valid aliases: tiny.",'
        b'"type":"NotFoundError","param":"model","code":404}}',
    )
    assert await ask(engine, chat("tiny", 2, n=2), path) == (
        400,
        b'{"error":{"message":"n must be 1 when using greedy sampling, got 2.",'
        b'"type":"BadRequestError","param":null,"code":400}}',
    )
    assert await ask(engine, {"model": "tiny", "messages": []}, path) == (
        400,
        b'{"error":{"message":"Cannot apply chat template to an empty conversation. '
        b'Provide at least one message.","type":"BadRequestError","param":null,"code":400}}',
    )
    assert await ask(engine, {}, "/v1/nothing") == (404, b'{"detail":"Not Found"}')


async def test_a_plain_chat_answer(engine: VllmEngine) -> None:
    prompt = await engine.tokenize("tiny", MESSAGES)
    status, body = await ask(engine, chat("tiny", 5), id="abc")
    assert status == 200
    count = len(prompt)
    assert masked(body) == (
        '{"id":"chatcmpl-abc","object":"chat.completion","created":0,"model":"tiny","choices":[{"index":0,'
        '"message":{"role":"assistant","content":"…","refusal":null,"annotations":null,"audio":null,'
        '"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,'
        '"token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"F",'
        f'"usage":{{"prompt_tokens":{count},"total_tokens":{count + 5},"completion_tokens":5,'
        '"prompt_tokens_details":null,"completion_tokens_details":null},"prompt_logprobs":null,'
        '"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,'
        '"metrics":null}'
    )


@pytest.mark.parametrize("usage", [True, False])
async def test_a_streamed_chat_answer(engine: VllmEngine, usage: bool) -> None:
    prompt = len(await engine.tokenize("tiny", MESSAGES))
    more = {"stream_options": {"include_usage": True}} if usage else {}
    status, body = await ask(engine, chat("tiny", 3, stream=True, **more), id="abc")
    assert status == 200
    head = (
        'data: {"id":"chatcmpl-abc","object":"chat.completion.chunk","created":0,"model":"tiny",'
        '"choices":['
    )
    middle = '{"index":0,"delta":{"content":"…"},"logprobs":null,"finish_reason":'
    fingerprint = ',"system_fingerprint":"F"'
    totals = f'"prompt_tokens":{prompt},"total_tokens":{prompt + 3},"completion_tokens":3'
    last = f'{head}],"usage":{{{totals}}}{fingerprint}}}' if usage else None
    opening = (
        f'{head}{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,'
        '"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}'
    )
    token = f'{head}{middle}null,"token_ids":null}}]}}'
    ending = (
        f'{head}{middle}"length","stop_reason":null,"token_ids":null}}]'
        f"{'' if usage else fingerprint}}}"
    )
    # A token that is no whole character has empty content in vLLM, or with a tool parser none; here
    # that makes no difference.
    text = re.sub(r'"delta":\{("content":"")?\}', '"delta":{"content":"…"}', masked(body))
    closing = [ending, *([last] if last else []), "data: [DONE]"]
    assert _without_repeats(text, token) in _streams([opening], token, closing)


def _streams(before: list[str], token: str, after: list[str]) -> list[str]:
    """The two forms of a stream: vLLM joins tokens that the server is too busy to send singly."""
    return [
        "".join(f"{event}\n\n" for event in events)
        for events in ([*before, token, *after], [*before, *after])
    ]


def _without_repeats(text: str, token: str) -> str:
    return re.sub(rf"(?:{re.escape(token)}\n\n)+", lambda _: f"{token}\n\n", text)


async def test_every_choice_is_opened_and_ended(engine: VllmEngine) -> None:
    body = chat("tiny", 4, n=3, stream=True, temperature=1, stream_options={"include_usage": True})
    _, sent = await ask(engine, body)
    events = [json.loads(line[6:]) for line in sent.decode().split("\n\n") if line[6:7] == "{"]
    choices = [choice for event in events for choice in event["choices"]]
    opened = [choice["index"] for choice in choices if "role" in choice["delta"]]
    ended = [choice["index"] for choice in choices if choice["finish_reason"] == "length"]
    assert sorted(opened) == sorted(ended) == [0, 1, 2]
    assert events[-1]["usage"]["completion_tokens"] == 12


async def test_a_server_shows_whether_it_calls_tools_and_generates_nothing(
    engine: VllmEngine,
) -> None:
    assert await engine.parses_tools("tiny") is True


UNIT = {
    "type": "object",
    "properties": {"unit": {"type": "string", "enum": ["celsius"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": UNIT}}
BY_NAME = {"type": "function", "function": {"name": "weather"}}
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
#: A random model never ends the blanks that JSON allows between its parts: tab, newline, return,
#: space, as the tiny model's tokens.
NO_BLANKS = {str(_ALPHABET.index(blank) + len(SPECIAL_TOKENS)): -100 for blank in "ĉĊčĠ"}
#: Nor does it end a list of calls: the closing bracket, or the end, where that may come.
ONE_CALL = NO_BLANKS | {
    str(_ALPHABET.index("]") + len(SPECIAL_TOKENS)): 100,
    str(SPECIAL_TOKENS.index("<|im_end|>")): 100,
}


def call_of_weather(choice: Any) -> dict[str, Any]:
    more = {"tools": [WEATHER], "tool_choice": choice, "logit_bias": ONE_CALL}
    return chat("tiny", 128, ignore_eos=False, **more)


@pytest.mark.parametrize(("choice", "reason"), [(BY_NAME, "stop"), ("required", "tool_calls")])
async def test_a_tool_call(engine: VllmEngine, choice: Any, reason: str) -> None:
    body = call_of_weather(choice)
    status, whole = await ask(engine, body)
    assert status == 200, whole
    message = re.search(r'"choices":\[(.*)\],"service_tier"', masked(whole))
    assert message is not None
    arguments = r"{\"unit\":\"celsius\"}"
    assert message[1].replace('": ', '":') == (
        '{"index":0,"message":{"role":"assistant","content":"","refusal":null,"annotations":null,'
        '"audio":null,"function_call":null,"tool_calls":[{"id":"chatcmpl-tool-0","type":"function",'
        f'"function":{{"name":"weather","arguments":"{arguments}"}}}}],"reasoning":null}},'
        f'"logprobs":null,"finish_reason":"{reason}","stop_reason":null,"token_ids":null,'
        '"routed_experts":null}'
    )


@pytest.mark.parametrize(("choice", "reason"), [(BY_NAME, "stop"), ("required", "tool_calls")])
async def test_a_streamed_tool_call(engine: VllmEngine, choice: Any, reason: str) -> None:
    body = {**call_of_weather(choice), "stream": True}
    status, sent = await ask(engine, body, id="abc")
    assert status == 200, sent
    head = (
        'data: {"id":"chatcmpl-abc","object":"chat.completion.chunk","created":0,"model":"tiny",'
        '"choices":[{"index":0,"delta":'
    )
    tail = '"logprobs":null,"finish_reason":null,"token_ids":null}]}'
    part = '{"content":null,"tool_calls":[{"index":0,"function":{"arguments":"…"}}]}'
    opening = (
        f'{head}{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],'
        '"prompt_token_ids":null,"prompt_text":null}'
    )
    named = (
        f'{head}{{"content":null,"tool_calls":[{{"id":"chatcmpl-tool-0","type":"function",'
        f'"index":0,"function":{{"name":"weather"}}}}]}},{tail}'
    )
    ending = (
        f'{head}{{}},"logprobs":null,"finish_reason":"{reason}","stop_reason":null,'
        '"token_ids":null}],"system_fingerprint":"F"}'
    )
    text = re.sub(r'"arguments":"(?:[^"\\]|\\.)+"', '"arguments":"…"', masked(sent))
    events = [opening, named, f"{head}{part},{tail}", ending, "data: [DONE]"]
    assert _without_repeats(text, events[2]) == "".join(f"{event}\n\n" for event in events)
    pieces = re.findall(rb'"arguments":"((?:[^"\\]|\\.)+)"', sent)
    assert json.loads(b'"%b"' % b"".join(pieces)) == '{"unit":"celsius"}'


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_that_fits_a_schema(engine: VllmEngine, streamed: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "u", "strict": True, "schema": UNIT}}
    body = chat("tiny", 64, response_format=wanted, ignore_eos=False)
    if streamed:
        async with Stream(engine, body) as stream:
            await stream.first_token()
            text = await stream.rest()
    else:
        _, whole = await ask(engine, body)
        [choice] = json.loads(whole)["choices"]
        assert choice["finish_reason"] == "stop"
        text = choice["message"]["content"]
    assert text == '{"unit":"celsius"}'


async def test_a_tool_that_is_not_offered_is_refused(engine: VllmEngine) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    assert await ask(engine, chat("tiny", 2, tools=[WEATHER], tool_choice=other)) == (
        400,
        b'{"error":{"message":"The tool specified in `tool_choice` does not match any of the '
        b'specified `tools` (parameter=tool_choice)","type":"BadRequestError",'
        b'"param":"tool_choice","code":400}}',
    )


async def test_plain_and_streamed_completions(engine: VllmEngine) -> None:
    path = "/v1/completions"
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    _, whole = await ask(engine, body, path, id="abc")
    assert masked(whole) == (
        '{"id":"cmpl-abc","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":"…",'
        '"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,'
        '"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"F","usage":'
        '{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2,"prompt_tokens_details":null,'
        '"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
    )
    _, streamed = await ask(engine, {**body, "stream": True}, path, id="abc")
    head = (
        'data: {"id":"cmpl-abc","object":"text_completion","created":0,"model":"tiny",'
        '"choices":[{"index":0,"text":"…","logprobs":null,"finish_reason":'
    )
    tail = '"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]'
    token = f"{head}null,{tail}}}"
    closing = [f'{head}"length",{tail},"system_fingerprint":"F"}}', "data: [DONE]"]
    assert _without_repeats(masked(streamed), token) in _streams([], token, closing)


async def test_the_model_list_is_vllms(engine: VllmEngine, address: EngineAddress) -> None:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {address.api_key}"}) as session,
        session.get(f"{address.url}/v1/models") as reply,
    ):
        text = masked(await reply.read())
    assert re.fullmatch(
        r'\{"object":"list","data":\[\{"id":"tiny","object":"model","created":0,'
        r'"owned_by":"vllm","root":"[^"]+","parent":null,"max_model_len":\d+,"permission":\[\{"id":"modelperm-0","object":"model_permission",'
        r'"created":0,"allow_create_engine":false,"allow_sampling":true,"allow_logprobs":true,'
        r'"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"organization":"\*",'
        r'"group":null,"is_blocking":false\}\]\}.*\]\}',
        text,
    )


async def test_a_rendered_text_is_read_as_the_prompt_was(engine: VllmEngine) -> None:
    prompt = await engine.tokenize("tiny", [{"role": "system", "content": "Hi"}])
    text = "<|im_start|>system\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert await engine.tokenize_text("tiny", text) == prompt


@pytest.mark.parametrize(
    ("template", "min_model_len", "reason"),
    [
        (CHAT_TEMPLATE, 512, None),
        (CHAT_TEMPLATE.replace(DEFAULT_SYSTEM, "Be kind."), 512, "another template than 'tiny'"),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant"), 512, "another template than 'tiny'"),
        (CHAT_TEMPLATE, 513, "at most 512 tokens, and 513 are counted on"),
        ("{{ raise_exception('no') }}", 512, None),  # it takes no conversation at all
    ],
)
async def test_an_engine_shows_by_which_template_and_how_much_it_reads(
    engine: VllmEngine, template: str, min_model_len: int, reason: str | None
) -> None:
    await engine.list_models()
    base = replace(BASE, chat_template=ChatTemplate(template))
    found = await SamePrompt(base, min_model_len).find_difference(engine)
    assert found is reason or reason in str(found)


async def test_figures_tell_weights_apart_and_a_new_name_keeps_them(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    base = await engine.prompt_logprobs("tiny", PROMPT_IDS)
    assert [len(figures) for figures in base] == [len(ids) - 1 for ids in PROMPT_IDS]
    assert all(figure < 0 for figures in base for figure in figures)
    first = await engine.prompt_logprobs(await load(tiny_adapters[0]), PROMPT_IDS)
    other = await engine.prompt_logprobs(await load(tiny_adapters[1]), PROMPT_IDS)
    again = await engine.prompt_logprobs(await load(tiny_adapters[0]), PROMPT_IDS)
    assert _distance(first, again) < 1e-3
    assert min(_distance(first, base), _distance(other, base), _distance(first, other)) > 0.3


def _distance(left: list[list[float]], right: list[list[float]]) -> float:
    """Mean absolute difference, in nats."""
    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


async def test_no_prompts_have_no_figures_and_one_token_has_none(engine: VllmEngine) -> None:
    assert await engine.prompt_logprobs("tiny", []) == []
    assert await engine.prompt_logprobs("tiny", [[50]]) == [[]]


async def test_figures_may_be_asked_for_while_others_generate(engine: VllmEngine) -> None:
    answers = [asyncio.create_task(text_of(engine, "tiny", 60)) for _ in range(3)]
    alone = await engine.prompt_logprobs("tiny", PROMPT_IDS)
    beside = [await engine.prompt_logprobs("tiny", PROMPT_IDS) for _ in range(3)]
    await asyncio.gather(*answers)
    assert all(_distance(alone, figures) < 1e-3 for figures in beside)


async def test_the_base_keeps_its_own_weights_beside_a_running_adapter(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    """vLLM's own CPU operators give tokens of the base the weights of the last slot."""
    name = await load(tiny_adapters[0])
    text, figures = (
        await text_of(engine, "tiny", 40),
        await engine.prompt_logprobs("tiny", PROMPT_IDS),
    )
    adapted = await engine.prompt_logprobs(name, PROMPT_IDS)
    async with Stream(engine, chat(name, 300)) as stream:
        await stream.first_token()
        assert await text_of(engine, "tiny", 40) == text
        assert _distance(await engine.prompt_logprobs("tiny", PROMPT_IDS), figures) < 1e-3
        assert not stream.ended
    assert _distance(adapted, figures) > 0.3


async def test_an_adapter_that_was_evicted_answers_as_before(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    names = [await load(folder) for folder in tiny_adapters]
    before = [await text_of(engine, name, 12) for name in names]
    after = [await text_of(engine, name, 12) for name in names]
    assert before == after
    assert len({*before, await text_of(engine, "tiny", 12)}) == len(names) + 1


async def test_a_running_answer_is_unchanged_while_others_load_beyond_the_slots(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    first = await load(tiny_adapters[0])
    alone = await text_of(engine, first, 200)
    async with Stream(engine, chat(first, 200)) as stream:
        await stream.first_token()
        others = [await load(folder) for folder in tiny_adapters[1:]]
        answers = [asyncio.create_task(text_of(engine, name, 8)) for name in others]
        base = await text_of(engine, "tiny", 8)
        assert await stream.rest() == alone
    assert len({base, *await asyncio.gather(*answers)}) == len(others) + 1


async def test_several_running_answers_are_unchanged_while_adapters_come_and_go(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    """Hot swap under load.

    Two adapters are in memory and one runs. While three answers run, each of nine loads throws
    weights out, mostly the running ones, and every second name is forgotten again at once.
    """
    first = await load(tiny_adapters[0])
    river = [{"role": "user", "content": "Name a river."}]
    asked = [(first, 300, MESSAGES), (first, 300, river), ("tiny", 300, MESSAGES)]
    alone = [await text_of(engine, *question) for question in asked]
    assert len(set(alone)) == len(asked)
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(Stream(engine, chat(model, tokens, messages=messages)))
            for model, tokens, messages in asked
        ]
        for stream in streams:
            await stream.first_token()
        for number, folder in enumerate(tiny_adapters[1:] * 3):
            name = await load(folder)
            if number % 2:
                await engine.unload(name)
        assert not any(stream.ended for stream in streams)
        together = await asyncio.gather(*[stream.rest() for stream in streams])
    assert together == alone


async def test_unloading_leaves_a_running_answer_whole(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    name = await load(tiny_adapters[0])
    alone = await text_of(engine, name, 200)
    async with Stream(engine, chat(name, 200)) as stream:
        await stream.first_token()
        await engine.unload(name)
        with pytest.raises(EngineRefused):
            await engine.touch(name)
        assert await stream.rest() == alone


async def test_a_loaded_name_is_refused_other_weights(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path]
) -> None:
    name = await load(tiny_adapters[0])
    before = await text_of(engine, name, 12)
    with pytest.raises(EngineRefused, match="has already been loaded") as refused:
        await engine.load(name, str(tiny_adapters[1]))
    assert refused.value.status == 400
    assert (await engine.list_models())[name] == str(tiny_adapters[0])
    assert await text_of(engine, name, 12) == before


async def test_other_weights_under_a_used_name_and_path_answer_from_the_old_cache(
    engine: VllmEngine, load: Load, tiny_adapters: list[Path], tmp_path: Path
) -> None:
    """Why names and paths are never reused: the prefix cache is keyed by them, not by weights."""
    folder, name = tmp_path / "reused", f"reused-{next(_numbers)}"
    shutil.copytree(tiny_adapters[0], folder)
    await engine.load(name, str(folder))
    old = await text_of(engine, name, 12, LONG)
    await engine.unload(name)
    shutil.copytree(tiny_adapters[1], folder, dirs_exist_ok=True)
    await engine.load(name, str(folder))
    mixed = await text_of(engine, name, 12, LONG)
    await engine.unload(name)
    right = await text_of(engine, await load(folder), 12, LONG)
    assert right not in (old, mixed)


@pytest.mark.parametrize("streamed", [True, False])
async def test_leaving_early_ends_the_generation(engine: VllmEngine, streamed: bool) -> None:
    before = await _tokens_made(engine)
    body = chat("tiny", 400, stream=streamed)
    if streamed:
        async with Stream(engine, body) as stream:
            await stream.first_token()
            await _running(engine, 1)
    else:
        asking = asyncio.create_task(ask(engine, body))
        await _running(engine, 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await _running(engine, 0)
    assert await _tokens_made(engine) - before < 400


class Stream:
    """A streamed chat answer: `async with Stream(engine, body) as stream`.

    Leaving the context before the end closes the connection.
    """

    def __init__(self, engine: VllmEngine, body: dict[str, Any]) -> None:
        self.ended = False  #: the event after the last has been read
        self._sent = json.dumps({**body, "stream": True}).encode()
        self._engine = engine
        self._stack = AsyncExitStack()
        self._text = ""

    async def __aenter__(self) -> Stream:
        reply = await self._stack.enter_async_context(
            self._engine.post(
                "/v1/chat/completions", self._sent, request_id="stream", timeout_seconds=60
            )
        )
        assert reply.status == 200
        self._pieces = self._read(reply.body)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pieces.aclose()
        await self._stack.aclose()

    async def _read(self, body: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
        """The answer's text, piece by piece as it arrives."""
        buffer = b""
        async for chunk in body:
            *events, buffer = (buffer + chunk).split(b"\n\n")
            for event in events:
                if event == b"data: [DONE]":
                    self.ended = True
                    return
                for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece

    async def first_token(self) -> None:
        """Wait until some text has arrived."""
        self._text += await anext(self._pieces)

    async def rest(self) -> str:
        """Read to the end; the whole text, from its first token on."""
        async for piece in self._pieces:
            self._text += piece
        assert self.ended, "the stream broke off"
        return self._text


async def _metric(engine: VllmEngine, name: str) -> float:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{engine.address.url}/metrics") as reply,
    ):
        text = await reply.text()
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found, f"/metrics has no {name}"
    return float(found[1])


async def _running(engine: VllmEngine, count: int) -> None:
    """Wait until so many requests run: another process's count has no event to wait for."""
    async with asyncio.timeout(10):
        while await _metric(engine, "vllm:num_requests_running") != count:
            await asyncio.sleep(0.02)


async def _tokens_made(engine: VllmEngine) -> float:
    """Tokens that the engine has generated since it started."""
    return await _metric(engine, "vllm:generation_tokens_total")
