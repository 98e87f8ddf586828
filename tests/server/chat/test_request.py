"""Which fields of a request pass, which are named as ignored, which are refused."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.answers import OURS
from feedback.errors import BadRequest, TooLarge
from server.chat.engine_request import engine_body, with_system_prompt
from server.chat.request import REFUSED, Parsed, check_tools, is_task, parse_chat, parse_text
from server.http.bodies import MAX_DEPTH, MAX_PARTS, parse_body
from server.settings import TASK_PROMPTS, EngineSettings

HI = [{"role": "user", "content": "hi"}]
KWARGS = frozenset({"enable_thinking"})


def parse(strict: bool = False, **fields: Any) -> Parsed:
    body = {"model": "assistant", "messages": HI, **fields}
    return parse_chat(body, max_choices=8, strict=strict)


def sent(parsed: Parsed, sampling: dict[str, Any] | None = None) -> dict[str, Any]:
    return engine_body(
        parsed,
        engine_name="assistant-1-0000",
        messages=parsed.messages,
        sampling=sampling or {},
        template_kwargs=KWARGS,
    )


class Listed(tuple[str, ...]):
    """Names that nobody may look through for each field: there may be 20,000 of both."""

    def __contains__(self, name: object) -> bool:
        raise AssertionError(f"looked through for {name!r}")


def test_ignored_fields_are_not_looked_through_for_each_field() -> None:
    request = parse(unknown=1)
    assert request.ignored == ("unknown",)
    assert "unknown" not in sent(replace(request, ignored=Listed(request.ignored)))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":1,"a":2}',
        b'{"a":[{"b":1,"b":1}]}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":1} x',
    ],
)
def test_a_body_that_is_no_plain_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_body(raw, max_bytes=1024 * 1024)


def test_a_body_that_is_too_long_is_413() -> None:
    with pytest.raises(TooLarge):
        parse_body(b" " * 1025, max_bytes=1024)


FORWARDED = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 1,
    "frequency_penalty": -1,
    "n": 2,
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "min_tokens": 1,
    "stop": ["a", "b"],
    "stop_token_ids": [1],
    "seed": 3,
    "logit_bias": {"5": -100},
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "low",
    "stream": True,
}


def test_forwarded_fields_reach_the_engine_as_they_were_sent() -> None:
    body = sent(parse(**FORWARDED))
    assert {name: body[name] for name in FORWARDED} == FORWARDED
    assert body["model"] == "assistant-1-0000"
    assert parse(**FORWARDED).ignored == ()


def test_our_own_fields_stay_here_and_are_not_called_ignored() -> None:
    ours = {"user": "u", "safety_identifier": "s", "store": False, "metadata": {"a": "b"}}
    parsed = parse(**ours)
    assert parsed.ignored == ()
    assert not ours.keys() & sent(parsed).keys()


def test_unknown_fields_are_named_and_go_nowhere() -> None:
    parsed = parse(service_tier="flex", prompt_logprobs=1, guided_json={}, add_generation_prompt=0)
    assert parsed.ignored == (
        "add_generation_prompt",
        "guided_json",
        "prompt_logprobs",
        "service_tier",
    )
    assert sent(parsed).keys() == {"model", "messages"}
    with pytest.raises(BadRequest, match="service_tier"):
        parse(strict=True, service_tier="flex")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_could_change_template_or_weights_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequest, match=name) as refused:
        parse(**{name: "x"})
    assert refused.value.param == name
    with pytest.raises(BadRequest, match=name):
        parse(chat_template_kwargs={name: "x"})
    with pytest.raises(BadRequest, match=name):
        parse_text({"model": "m", "prompt": "p", name: "x"}, max_choices=1, strict=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", "m" * 257),
        ("model", 5),
        ("messages", []),
        ("messages", "hi"),
        ("messages", ["hi"]),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("top_k", -2),
        ("n", 0),
        ("n", 9),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("seed", 2**63),
        ("stop", ["x"] * 17),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("metadata", {"k": 5}),
        ("metadata", {"k": "a\x00b"}),
        ("metadata", {"a\x00b": "v"}),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {str(i): "v" for i in range(17)}),
        ("user", "u" * 257),
        ("store", 1),
        ("tools", {}),
        ("tool_choice", "always"),
        ("logprobs", 1),
        ("top_logprobs", 21),
    ],
)
def test_a_value_out_of_bounds_is_refused_and_its_field_named(name: str, value: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize(
    "message",
    [
        {"content": "hi"},
        {"role": "robot", "content": "hi"},
        {"role": ["user"], "content": "hi"},
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": ["hi"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": ["text"], "text": "hi"}]},
        {"role": "user", "content": [{"type": "refusal", "refusal": None}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "assistant", "tool_calls": ["f"]},
        {"role": "assistant", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [{"function": None}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(message: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(messages=[*HI, message])
    assert refused.value.param == "messages[1]"


def test_only_the_template_arguments_that_a_deployment_lists_pass() -> None:
    parsed = parse(chat_template_kwargs={"enable_thinking": False, "other": 1})
    assert sent(parsed)["chat_template_kwargs"] == {"enable_thinking": False}
    nested = parse(chat_template_kwargs={"enable_thinking": {"a": 1}})
    assert "chat_template_kwargs" not in sent(nested)


def test_a_release_s_sampling_stands_below_the_caller_s() -> None:
    sampling = {"temperature": 0.2, "max_tokens": 100}
    assert sent(parse(), sampling)["temperature"] == 0.2
    assert sent(parse(temperature=1), sampling)["temperature"] == 1
    assert sent(parse(temperature=None), sampling)["temperature"] == 0.2
    body = sent(parse(max_completion_tokens=5), sampling)
    assert body["max_completion_tokens"] == 5
    assert "max_tokens" not in body


def test_usage_is_always_asked_of_a_stream_and_shown_on_request() -> None:
    plain, asked = parse(stream=True), parse(stream=True, stream_options={"include_usage": True})
    assert sent(plain)["stream_options"] == sent(asked)["stream_options"] == {"include_usage": True}
    assert (plain.include_usage, asked.include_usage) == (False, True)


def test_a_text_completion_cannot_bring_messages_along() -> None:
    body = {"model": "m", "prompt": "once", "messages": HI, "max_tokens": 3}
    parsed = parse_text(body, max_choices=1, strict=False)
    assert parsed.ignored == ("messages",)
    assert sent(parsed) == {"model": "assistant-1-0000", "prompt": "once", "max_tokens": 3}


def test_the_system_prompt_gives_way_or_goes_before() -> None:
    theirs = [{"role": "system", "content": "be brief"}, *HI]
    assert with_system_prompt(HI, None, prepend=True) == HI
    assert with_system_prompt(HI, "ours", prepend=False) == [
        {"role": "system", "content": "ours", OURS: True},
        *HI,
    ]
    assert with_system_prompt(theirs, "ours", prepend=False) == theirs
    joined = with_system_prompt(theirs, "ours", prepend=True)
    assert joined[0] == {"role": "system", "content": "ours\n\nbe brief", OURS: True}


def test_the_mark_of_our_messages_comes_from_nobody_else_and_is_never_sent() -> None:
    parsed = parse(messages=[{"role": "user", "content": "hi", OURS: True}])
    assert OURS not in parsed.messages[0]
    marked = with_system_prompt(parsed.messages, "ours", prepend=False)
    body = engine_body(
        parsed, engine_name="e", messages=marked, sampling={}, template_kwargs=KWARGS
    )
    assert all(OURS not in message for message in body["messages"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([*FORWARDED, "messages", "metadata", "chat_template_kwargs", "x"]),
        json_values,
        max_size=4,
    )
)
def test_any_json_is_either_refused_or_can_be_sent_on(fields: dict[str, Any]) -> None:
    raw = json.dumps({"model": "m", "messages": HI, **fields}).encode()
    with suppress(BadRequest):
        parsed = parse_chat(parse_body(raw, max_bytes=2**20), max_choices=8, strict=False)
        assert json.loads(json.dumps(sent(parsed), allow_nan=False))["model"] == "assistant-1-0000"


@given(
    st.recursive(
        st.text() | st.integers(-(2**63), 2**64 - 1) | st.floats(-1e300, 1e300),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_whatever_is_sound_is_read_as_it_is(value: Any) -> None:
    raw = json.dumps({"a": value}).encode()
    if b"u0000" in raw:
        return
    assert parse_body(raw, max_bytes=2**20) == {"a": value}


@pytest.mark.parametrize(
    ("value", "sound"),
    [
        ("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), True),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, False),
        (json.dumps("[" * 99), True),
        (json.dumps('\\" [' * 99), True),
        (str(2**64 - 1), True),
        (str(2**64), False),
        (str(-(2**63)), True),
        (str(-(2**63) - 1), False),
        (json.dumps(str(2**70)), True),
        ("0.12345678901234567890123", True),
        ("1e-00000000000000000000001", True),
        (json.dumps("a\\u0000"), True),
        ("[" + "1," * MAX_PARTS + "1]", False),
        (json.dumps("," * MAX_PARTS), True),
    ],
)
def test_what_a_body_may_hold_is_bounded(value: str, sound: bool) -> None:
    raw = b'{"a": ' + value.encode() + b"}"
    if sound:
        assert parse_body(raw, max_bytes=2**20) == {"a": json.loads(value)}
    else:
        with pytest.raises(BadRequest):
            parse_body(raw, max_bytes=2**20)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


TITLE = "### Task:\nGenerate a concise title summarizing the chat history.\n### Guidelines: …"


@pytest.mark.parametrize(
    ("messages", "is_one"),
    [
        (user(TITLE), True),
        (user([{"type": "text", "text": TITLE}]), True),
        ([{"role": "system", "content": "Be brief."}, *user(TITLE)], True),
        (user("### Task:\nSuggest 3-5 relevant follow-up questions"), True),
        (user("### Task:\nRespond to the user query using the provided context"), False),
        (user("What does ### Task:\nGenerate mean?"), False),
        ([*user("hi"), {"role": "assistant", "content": "Hello"}, *user(TITLE)], False),
    ],
)
def test_a_front_end_s_own_call_is_known_by_its_prompt(
    messages: list[dict[str, Any]], is_one: bool
) -> None:
    assert is_task(parse(messages=messages), TASK_PROMPTS) is is_one
    assert not is_task(parse(messages=messages), ())


def test_a_front_end_may_say_that_a_call_is_its_own() -> None:
    assert is_task(parse(metadata={"task": "title_generation"}), ())


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("choice", [{}, {"tool_choice": None}, {"tool_choice": "auto"}])
def test_tools_that_nobody_can_call_go_and_are_named(choice: dict[str, Any]) -> None:
    asked = parse(tools=TOOLS, parallel_tool_calls=False, made_up=1, **choice)
    parsed = check_tools(asked, False, strict=False)
    named = ["tools", *(name for name, value in choice.items() if value), "parallel_tool_calls"]
    assert parsed.ignored == ("made_up", *named)
    assert parsed.given.keys() == {"model", "messages", "made_up", *(choice.keys() - set(named))}
    with pytest.raises(BadRequest, match=r"engine\.tool_parser") as refused:
        check_tools(parse(tools=TOOLS, **choice), False, strict=True)
    assert refused.value.param == "tools"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_is_demanded_and_cannot_be_made_is_refused(choice: Any) -> None:
    for strict in (False, True):
        with pytest.raises(BadRequest, match=r"engine\.tool_parser") as refused:
            check_tools(parse(tools=TOOLS, tool_choice=choice), False, strict=strict)
        assert refused.value.param == "tool_choice"


@pytest.mark.parametrize("strict", [False, True])
def test_tools_that_may_be_called_or_must_not_stay_as_they_are(strict: bool) -> None:
    for choice in ("auto", "required", NAMED, "none"):
        parsed = parse(tools=TOOLS, tool_choice=choice)
        for parses in (True, None):
            assert check_tools(parsed, parses, strict=strict) is parsed
    assert check_tools(parsed, False, strict=strict) is parsed


@pytest.mark.parametrize("tools", [{}, {"tools": None}, {"tools": []}])
def test_a_choice_among_no_tools_goes_unnamed_unless_it_demands_a_call(
    tools: dict[str, Any],
) -> None:
    for choice in (None, "auto", "none"):
        asked = parse(tool_choice=choice, parallel_tool_calls=True, **tools)
        parsed = check_tools(asked, None, strict=True)
        assert parsed.ignored == ()
        said = {name for name, value in parsed.given.items() if value is not None}
        assert said == {"model", "messages"}
    with pytest.raises(BadRequest, match="there are no tools"):
        check_tools(parse(tool_choice="required", **tools), True, strict=False)


@pytest.mark.parametrize(("setting", "parses"), [("auto", None), ("none", False), ("hermes", True)])
def test_a_parser_that_is_set_needs_no_question(setting: str, parses: bool | None) -> None:
    assert EngineSettings(tool_parser=setting).parses_tools is parses


def test_what_a_message_may_not_have_is_named_and_goes_nowhere() -> None:
    part = {"type": "text", "text": "a", "image_url": {"url": "http://x"}}
    messages = [
        {"role": "user", "content": "Hi", "chat_template": "x"},
        {"role": "assistant", "content": [part], "name": "n"},
    ]
    parsed = parse(messages=messages, made_up=1)
    assert parsed.ignored == (
        "made_up",
        "messages[0].chat_template",
        "messages[1].content[0].image_url",
    )
    kept = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "name": "n"},
    ]
    assert parsed.messages == kept
    with pytest.raises(BadRequest, match="chat_template"):
        parse(messages=messages, strict=True)


def text(prompt: Any) -> Parsed:
    body = {"model": "assistant", "prompt": prompt}
    return parse_text(body, max_choices=8, strict=False)


def test_a_whole_number_written_with_a_point_reaches_the_engine_as_one() -> None:
    numbers = {"max_tokens": 8.0, "n": 2.0, "seed": -1.0, "top_k": 40.0, "top_logprobs": 3.0}
    body = sent(parse(**numbers, stop_token_ids=[7.0], temperature=1.0, logprobs=True))
    for name, value in numbers.items():
        assert (body[name], type(body[name])) == (value, int)
    assert type(body["stop_token_ids"][0]) is int
    assert type(body["temperature"]) is float
    for name in numbers:
        with pytest.raises(BadRequest, match=name):
            parse(**{name: 1.5})


def test_numbers_within_tools_and_metadata_stay_as_they_were_written() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"minimum": 1.0}}}
    assert type(sent(parse(tools=[tool]))["tools"][0]["function"]["parameters"]["minimum"]) is float


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [-1, 0, -1.0])
def test_no_limit_is_said_by_leaving_it_out(name: str, value: float) -> None:
    with pytest.raises(BadRequest, match="leave it out for no limit") as refused:
        parse(**{name: value})
    assert refused.value.param == name


def test_a_prompt_may_be_a_list_of_one_text() -> None:
    parsed = text(["Once upon a time"])
    assert parsed.messages == [{"role": "prompt", "content": "Once upon a time"}]
    assert sent(parsed)["prompt"] == "Once upon a time"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (["a", "b"], "2 texts"),
        ([], "0 texts"),
        ([[1, 2, 3]], "token ids"),
        ([1, 2], "token ids"),
        ([""], "at least 1 character"),
    ],
)
def test_other_lists_of_prompts_are_refused(prompt: list[Any], found: str) -> None:
    with pytest.raises(BadRequest, match=found) as refused:
        text(prompt)
    assert refused.value.param == "prompt"
