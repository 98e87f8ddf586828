"""Templates: what they are given, what they refuse, and where an answer's text begins.

That they render as a real vLLM does is promise 43.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from feedback.formats.messages import as_sent
from tests.chat_templates import CHATML, NO_SYSTEM, THINKING
from tuner.chat_template import AnswerRewritten, ChatTemplate, TemplateRefused, until_end_of_turn

USER = {"role": "user", "content": "Hi"}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_what_comes_in_several_forms_is_sent_in_one() -> None:
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "so",
            "tool_calls": [{"function": {"name": "f", "arguments": {"z": "é", "a": 1}}}],
        },
    ]
    sent = as_sent(given)
    assert sent == [
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "so",
            "tool_calls": [
                {
                    "id": "call_0",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"z": "é", "a": 1}'},
                }
            ],
        },
    ]
    assert as_sent(sent) == sent


def test_arguments_are_one_prompt_as_text_and_as_object() -> None:
    for text in (CHATML, THINKING):
        rendered = {
            ChatTemplate(text).render(
                as_sent(
                    [
                        USER,
                        {
                            "role": "assistant",
                            "content": "",
                            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
                        },
                    ]
                ),
                add_generation_prompt=True,
            )
            for arguments in ('{"z":1,"a":"é"}', {"z": 1, "a": "é"})
        }
        assert len(rendered) == 1


def test_an_answer_is_what_stands_behind_the_prompt() -> None:
    asked, answered = ChatTemplate(THINKING).render_answer([USER], assistant("Yes."))
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert answered == "Yes.<|im_end|>\n"


@pytest.mark.parametrize("content", ["<think>\nso\n</think>\n\nYes.", "</think>"])
def test_an_answer_whose_thoughts_are_cut_is_rewritten(content: str) -> None:
    with pytest.raises(AnswerRewritten):
        ChatTemplate(THINKING).render_answer([USER], assistant(content))


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.items() }}",
        "{{ messages[5].role }}",
        "{{ 1 // 0 }}",
        "{% if %}",
    ],
)
def test_whatever_a_template_raises_is_a_refusal(text: str) -> None:
    with pytest.raises(TemplateRefused):
        ChatTemplate(text).render([USER], add_generation_prompt=True)


def test_a_system_prompt_is_refused_by_a_template_that_takes_or_writes_none() -> None:
    assert ChatTemplate(CHATML).refuses_system("Be brief.") is None
    assert ChatTemplate(NO_SYSTEM).refuses_system("Be brief.") == "System role not supported"
    silent = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(silent).refuses_system("Be brief.") == "it leaves system messages out"


def test_a_template_writes_the_date_of_the_time_it_is_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    at = datetime(2026, 2, 1, tzinfo=UTC)
    assert template.render([USER], add_generation_prompt=True, at=at) == "01 Feb 2026"


def test_with_tools_the_template_for_tools_is_used() -> None:
    template = ChatTemplate("plain", tools_text="{{ tools[0].function.name }}")
    tool = {"type": "function", "function": {"name": "find"}}
    assert template.render([USER], add_generation_prompt=True) == "plain"
    assert template.render([USER], [tool], add_generation_prompt=True) == "find"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((5, 6, 2, 10), (5, 6, 2)),  # the template's line feed goes
        ((5, 2, 6, 2), (5, 2, 6, 2)),
        ((5, 6), (5, 6, 2)),  # a template without one
        ((), (2,)),
    ],
)
def test_a_completion_ends_with_its_end_token(
    tokens: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert until_end_of_turn(tokens, (2, 3)) == expected
