"""Which of vLLM's tool parsers reads a base's calls of tools: it follows from the chat template.

Owns: the signs by which a template says how the model writes a call, and the choice between them
and the settings. Pure. Does not own: what becomes of a request with tools where there is no parser
(`server/chat/request.py`), or the parsers, which are vLLM's (`vllm/tool_parsers`, 0.32).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTOMATIC, NONE = "auto", "none"

_CODE = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_STRINGS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_TOOLS = re.compile(r"(?<![\w.])tools\b")


@dataclass(frozen=True, slots=True)
class Sign:
    """What a template has where its model writes calls in the way that `parser` reads."""

    parser: str
    text: str  #: stands in the template, somewhere
    also: str = ""  #: and so does this
    architecture: str = ""  #: `model_type` begins with this; empty: any


SIGNS = (
    # Marks that one family alone has.
    Sign("openai", "<|channel|>commentary"),
    Sign("mistral", "[AVAILABLE_TOOLS]"),
    Sign("mistral", "[TOOL_CALLS]"),
    Sign("deepseek_v3", "<｜tool▁call▁begin｜>", also="```json"),
    Sign("deepseek_v31", "<｜tool▁call▁begin｜>"),
    Sign("deepseek_v32", "<｜DSML｜"),
    Sign("kimi_k2", "<|tool_call_argument_begin|>"),
    Sign("minimax_m2", "<minimax:tool_call>"),
    Sign("seed_oss", "<seed:tool_call>"),
    Sign("longcat", "<longcat_tool_call>"),
    Sign("muse_glimmer", "<atem:function_calls>"),
    Sign("gemma4", "<|tool_call>"),
    Sign("functiongemma", "<start_function_call>"),
    Sign("lfm2", "<|tool_call_start|>"),
    Sign("lfm2", "<|tool_list_start|>"),
    Sign("apertus", "<|tools_prefix|>"),
    Sign("cohere_command3", "<|START_ACTION|>"),
    Sign("internlm", "<|action_start|>", also="<|plugin|>"),
    Sign("olmo3", "<function_calls>"),
    Sign("phi4_mini_json", "<|/tool|>"),
    Sign("phi4_mini_json", "functools["),
    # Marks that families share: the narrower one first.
    Sign("hunyuan_a13b", "<tool_calls>", architecture="hunyuan"),
    Sign("jamba", "<tool_calls>", architecture="jamba"),
    Sign("granite4", "<tool_call>", architecture="granite"),
    Sign("granite", "<|start_of_role|>", architecture="granite"),
    Sign("glm45", "<tool_call>", also="<arg_key>"),
    Sign("qwen3_coder", "<function=", also="<parameter="),
    Sign("hermes", "<tool_call>"),
    # Llama's own way is told in words; the models that write Python are asked for a list of calls.
    Sign("llama4_pythonic", "[func_name1(", architecture="llama4"),
    Sign("pythonic", "[func_name1("),
    Sign("llama4_json", "JSON for a function call", architecture="llama4"),
    Sign("llama3_json", "JSON for a function call"),
)


def find_tool_parser(template: str, architecture: str) -> str | None:
    """The name of vLLM's parser for a base with this chat template; None where there is none.

    A template that never looks at `tools` shows them to no model, so there is nothing to parse.
    `architecture` is the `model_type` of the base's configuration.
    """
    if not renders_tools(template):
        return None
    return next(
        (
            sign.parser
            for sign in SIGNS
            if sign.text in template
            and sign.also in template
            and architecture.startswith(sign.architecture)
        ),
        None,
    )


def renders_tools(template: str) -> bool:
    """Whether a template reads the list of tools, and doesn't merely write the word."""
    return any(_TOOLS.search(_STRINGS.sub("", code)) for code in _CODE.findall(template))


def tool_options(
    setting: str, arguments: Mapping[str, Any], template: str, architecture: str
) -> dict[str, Any]:
    """The options by which vLLM calls tools, empty where it is to run without a parser.

    `setting` is `engine.tool_parser`, `arguments` are those of `[engine.args]` under vLLM's names:
    whoever chooses a parser there has the last word. Raises ValueError where both choose.
    """
    ours = {"enable-auto-tool-choice", "tool-call-parser"} & arguments.keys()
    if ours and setting != AUTOMATIC:
        raise ValueError(
            f"engine.tool_parser is {setting!r} and [engine.args] sets {', '.join(sorted(ours))}: "
            "leave one of them out"
        )
    if ours or setting == NONE:
        return {}
    parser = find_tool_parser(template, architecture) if setting == AUTOMATIC else setting
    if parser is None:
        return {}
    return {"enable-auto-tool-choice": True, "tool-call-parser": parser}
