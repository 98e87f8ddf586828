"""Which tool parser a base gets: by what its chat template shows, and by the settings."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from server.engines.tool_parsers import SIGNS, find_tool_parser, renders_tools, tool_options

SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}"
HERMES = SHOWN + '<tool_call>{"name": …, "arguments": …}</tool_call>'
WEATHER = "<tool_call>{{ name }}\n<arg_key>city</arg_key><arg_value>Bern</arg_value></tool_call>"


@pytest.mark.parametrize(
    ("template", "architecture", "parser"),
    [
        (HERMES, "qwen2", "hermes"),
        (HERMES, "smollm3", "hermes"),
        (SHOWN + "<tool_call><function=f><parameter=p>", "qwen3_moe", "qwen3_coder"),
        (SHOWN + WEATHER, "glm4_moe", "glm45"),
        (HERMES, "granitemoehybrid", "granite4"),
        (SHOWN + "<|start_of_role|>available_tools<|end_of_role|>", "granite", "granite"),
        (SHOWN + "Answer with JSON for a function call.", "llama", "llama3_json"),
        (SHOWN + "Answer with JSON for a function call.", "llama4", "llama4_json"),
        (SHOWN + "Write [func_name1(a=1), func_name2()].", "llama", "pythonic"),
        (SHOWN + "Write [func_name1(a=1), func_name2()].", "llama4", "llama4_pythonic"),
        ("{%- if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral", "mistral"),
        (SHOWN + "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n", "x", "deepseek_v3"),
        (SHOWN + "<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "deepseek_v3", "deepseek_v31"),
        ("<|tool|>{{ tools }}<|/tool|>", "phi3", "phi4_mini_json"),
        (SHOWN + "<|channel|>commentary to=", "gpt_oss", "openai"),
        (SHOWN + "<tool_calls>[]</tool_calls>", "jamba", "jamba"),
        (SHOWN + "<tool_calls>[]</tool_calls>", "hunyuan_v1_moe", "hunyuan_a13b"),
        (SHOWN + "<|tool_list_start|>", "lfm2", "lfm2"),
        # It shows the tools, and how they are called stands nowhere.
        (SHOWN, "llama", None),
        # It can render a call of the past, and shows the model no tools.
        ("{% for c in message['tool_calls'] %}<tool_call>{{ c }}{% endfor %}", "qwen2", None),
        ("{{ 'You have tools: ' }}<tool_call>", "qwen2", None),
        ("{% if message.tools %}{{ message['tools'] }}{% endif %}<|/tool|>", "phi3", None),
        ("<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>", "llama", None),
        ("", "llama", None),
    ],
)
def test_the_parser_follows_from_the_template(
    template: str, architecture: str, parser: str | None
) -> None:
    assert find_tool_parser(template, architecture) == parser


INSTALLED = {
    "qwen2_5.jinja": ("qwen2", "hermes"),
    "qwen3.jinja": ("qwen3", "hermes"),
    "qwen3_5_think.jinja": ("qwen3_5", "qwen3_coder"),
    "nemotron_3_nano.jinja": ("nemotron_h", "qwen3_coder"),
    "llama3_1.jinja": ("llama", "llama3_json"),
    "llama3_2.jinja": ("llama", "llama3_json"),
    "glm4moe.jinja": ("glm4_moe", "glm45"),
    "gptoss.jinja": ("gpt_oss", "openai"),
    "gemma4.jinja": ("gemma4", "gemma4"),
    "lfm2.jinja": ("lfm2", "lfm2"),
    "llama3.jinja": ("llama", None),
    "gemma3.jinja": ("gemma3_text", None),
    "phi3.jinja": ("phi3", None),
    "deepseekv3.jinja": ("deepseek_v3", None),  # it has marks for calls, and shows no tools
}


@pytest.mark.parametrize("name", INSTALLED)
def test_the_templates_that_models_ship_get_their_parser(name: str) -> None:
    """As a library that is installed for the tests has them."""
    architecture, parser = INSTALLED[name]
    template = (_package("trl") / "chat_templates" / name).read_text(encoding="utf-8")
    assert renders_tools(template) is (parser is not None)
    assert find_tool_parser(template, architecture) == parser


def test_vllm_has_every_parser_that_is_chosen() -> None:
    source = (_package("vllm") / "tool_parsers" / "__init__.py").read_text(encoding="utf-8")
    assert {sign.parser for sign in SIGNS} <= set(re.findall(r'^    "([\w-]+)": \(', source, re.M))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def with_parser(name: str) -> dict[str, Any]:
    return {"enable-auto-tool-choice": True, "tool-call-parser": name}


@pytest.mark.parametrize(
    ("setting", "arguments", "template", "options"),
    [
        ("auto", {}, HERMES, with_parser("hermes")),
        ("auto", {}, SHOWN, {}),
        ("none", {}, HERMES, {}),
        ("xlam", {}, "", with_parser("xlam")),
        ("auto", {"tool-call-parser": "xlam"}, HERMES, {}),  # these are vLLM's already
        ("auto", {"enable-auto-tool-choice": False}, HERMES, {}),
    ],
)
def test_a_setting_or_an_argument_has_the_last_word(
    setting: str, arguments: dict[str, Any], template: str, options: dict[str, Any]
) -> None:
    assert tool_options(setting, arguments, template, "qwen2") == options


def test_two_choices_of_a_parser_are_refused_by_both_names() -> None:
    with pytest.raises(ValueError, match=r"engine\.tool_parser is 'hermes'.*tool-call-parser"):
        tool_options("hermes", {"tool-call-parser": "xlam"}, HERMES, "qwen2")
