"""A base's chat template: from messages to the text that an engine is given, as vLLM renders it.

Owns: what vLLM makes of messages and tools before the template sees them (arguments as objects,
parts, reasoning, the `developer` role), the template's environment, and what a template refuses.
Used by the trainer and by the gateway, so both render alike; the grid in
`tests/promises/test_43_one_prompt.py` holds it to a real vLLM. Imports no torch. Does not own: the
tokenizer, or which text may not become control tokens (`control_tokens.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from feedback.formats.messages import parse_arguments, texts_of

Message = Mapping[str, Any]

PLAIN: Mapping[str, Any] = {"enable_thinking": False, "thinking": False}
"""Variables by which templates render their non-thinking form."""

#: The first line of a system text that vLLM leaves out, because it differs in each request.
_LEFT_OUT = "x-anthropic-billing-header"


class TemplateRefused(ValueError):
    """The template takes no such conversation; the message is the template's own."""


class AnswerRewritten(ValueError):
    """The template writes an answer otherwise than it was given, as one that cuts thoughts does."""


@dataclass(frozen=True)
class ChatTemplate:
    """One chat template. Compiled on first use."""

    text: str
    #: the template for requests with tools, where the base has one of its own
    tools_text: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)  #: as `bos_token`, to its text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
        at: datetime | None = None,
    ) -> str:
        """The prompt's text. `variables` are those of the request (`chat_template_kwargs`).

        `at` is the time that the template may write into it; None: now. Raises `TemplateRefused`.
        """
        text, compiled, takes_parts = (
            self._for_tools if tools and self.tools_text is not None else self._plain
        )
        try:
            return compiled.render(
                messages=template_messages(
                    messages, as_parts=takes_parts, knows_developer=_knows_developer(text)
                ),
                tools=[_template_tool(tool) for tool in tools] if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                # The engine's own clock and zone.
                strftime_now=(at or datetime.now()).strftime,  # noqa: DTZ005
                **{**self.special_tokens, **(variables or {})},
            )
        # A template is somebody's program: whatever it raises is its way to refuse.
        except Exception as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error

    def render_answer(
        self,
        prompt: Sequence[Message],
        answer: Message,
        tools: Sequence[Any] | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        at: datetime | None = None,
    ) -> tuple[str, str]:
        """The prompt's text in the template's non-thinking form, and the answer's behind it.

        The answer's goes on to what the template writes at its end. Raises `TemplateRefused`, and
        `AnswerRewritten` where the text is not the answer behind the prompt.
        """
        variables = {**(variables or {}), **PLAIN}
        asked = self.render(prompt, tools, add_generation_prompt=True, variables=variables, at=at)
        whole = self.render(
            [*prompt, answer], tools, add_generation_prompt=False, variables=variables, at=at
        )
        answered = whole[len(asked) :]
        if not whole.startswith(asked):
            raise AnswerRewritten("it writes other text before the answer than before it is given")
        if "\n".join(texts_of(answer.get("content"))).strip() not in answered:
            raise AnswerRewritten("it leaves out part of the answer")
        return asked, answered

    def refuses_system(self, prompt: str) -> str | None:
        """Why a conversation can't begin with this system prompt; None where it can."""
        question = {"role": "user", "content": "Hello"}
        messages = [{"role": "system", "content": prompt}, question]
        try:
            rendered = self.render(messages, add_generation_prompt=True)
        except TemplateRefused as refused:
            return str(refused)
        if prompt.strip() in rendered:
            return None
        return "it leaves system messages out"

    @cached_property
    def _plain(self) -> _Compiled:
        return _compile(self.text)

    @cached_property
    def _for_tools(self) -> _Compiled:
        return _compile(self.tools_text or self.text)


_Compiled = tuple[str, Template, bool]
"""A template's text, the program, and whether it reads a message's content as parts."""


def template_messages(
    messages: Sequence[Message], *, as_parts: bool, knows_developer: bool
) -> list[dict[str, Any]]:
    """Messages as vLLM hands them to a template (vllm/renderers/chat_utils.py).

    `as_parts`: texts become lists of one part. Without `knows_developer` that role's messages are
    system messages, joined at the beginning.
    """
    made = [_template_message(message, as_parts=as_parts) for message in messages]
    if knows_developer or all(message["role"] != "developer" for message in made):
        return made
    for message in made:
        if message["role"] == "developer":
            message["role"] = "system"
            message.pop("tools")
    return _join_system(made)


def until_end_of_turn(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Cut behind the last end token: what a template writes after it, an engine never generates.

    A template that writes none gets the first of `ends`.
    """
    for index in range(len(tokens), 0, -1):
        if tokens[index - 1] in ends:
            return tuple(tokens[:index])
    return (*tokens, *ends[:1])


def without_end(completion: Sequence[int]) -> tuple[int, ...]:
    """What a model wrote of an answer that was cut off: all but the end token."""
    return tuple(completion[:-1])


def _template_message(message: Message, *, as_parts: bool) -> dict[str, Any]:
    role = message["role"]
    texts = texts_of(message.get("content"))
    if role == "system":
        texts = _without_first_line(texts)
    content: Any = "\n".join(texts)
    if as_parts and role != "tool":
        content = [{"type": "text", "text": text} for text in texts]
    made: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        if calls := message.get("tool_calls"):
            made["tool_calls"] = [_template_call(call) for call in calls]
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            made |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif role == "tool" and "tool_call_id" in message:
        made["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        made["name"] = message["name"]
    if role == "developer":
        made["tools"] = None
    return made


def _without_first_line(texts: list[str]) -> list[str]:
    kept = []
    for text in texts:
        rest = text.partition("\n")[2] if text.startswith(_LEFT_OUT) else text
        if rest or rest == text:
            kept.append(rest)
    return kept


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of vLLM's own types, for templates that write a call as JSON."""
    function = call["function"]
    made = {
        "arguments": parse_arguments(function.get("arguments")),
        "name": function["name"],
        **{key: value for key, value in function.items() if key not in ("arguments", "name")},
    }
    rest = {key: value for key, value in call.items() if key not in ("id", "function", "type")}
    given = {"id": call["id"]} if "id" in call else {}
    return {**given, "function": made, "type": call.get("type", "function"), **rest}


def _template_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of vLLM's own types; what stands below `parameters` keeps the caller's."""
    function = tool.get("function") or {}
    made = {
        "name": function.get("name"),
        "description": function.get("description"),
        "parameters": function.get("parameters"),
    }
    if function.get("strict") is not None:
        made["strict"] = function["strict"]
    return {"type": "function", "function": made}


def _join_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All system messages as one at the beginning, where there is another one than that."""
    system = [message for message in messages if message["role"] == "system"]
    if len(system) == 1 and messages[0]["role"] == "system":
        return messages
    texts = ["\n".join(texts_of(message["content"])) for message in system]
    joined = {"role": "system", "content": "\n\n".join(filter(None, texts))}
    return [joined, *(message for message in messages if message["role"] != "system")]


def _knows_developer(text: str) -> bool:
    return '"developer"' in text or "'developer'" in text


class _Generation(Extension):
    """`{% generation %}`, a mark around what a model writes: rendered as what is in it."""

    tags = {"generation"}  # jinja2's own shape

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


def _compile(text: str) -> _Compiled:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise TemplateRefused(f"it can't be read: {error}") from error
    return text, compiled, _reads_parts(compiled)


def _reads_parts(compiled: Template) -> bool:
    """Whether the template writes the text of a content that is a list of parts.

    vLLM looks for a loop over the content; here such a content is tried.
    """
    marks = ("a first part", "a second part")
    content = [{"type": "text", "text": mark} for mark in marks]
    try:
        rendered = compiled.render(
            messages=[{"role": "user", "content": content}],
            tools=None,
            documents=None,
            add_generation_prompt=False,
            strftime_now=lambda form: form,
        )
    except Exception:  # as above: then it takes none
        return False
    return all(mark in rendered for mark in marks) and "{'type'" not in rendered


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that jinja2 would add for web pages."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> str:
    raise TemplateError(message)
