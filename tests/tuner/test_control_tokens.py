"""People's text never becomes a control token, and stays as it is where it could not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from tuner.control_tokens import ControlTokens

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "aab", "aba", "<｜User｜>")
TEMPLATE = "<|im_start|>user [INST] <<SYS>> <think> <tool_call> <|assistant|> {{ messages[0] }}"
CONTROL = ControlTokens.of(SPECIAL, ("<think>", "<tool_call>", "<table>"), [TEMPLATE])
EVERYWHERE = (*SPECIAL, "[INST]", "<<SYS>>", "<|assistant|>")

texts = st.lists(
    st.sampled_from([*EVERYWHERE, "<think>", "<|im_", "end|>", "<", "|>", "a", "b", " ", "\n", "é"])
).map("".join)


def said(value: Any) -> str:
    """Every text in the value, one after the other."""
    return json.dumps(value, ensure_ascii=False)


def test_special_tokens_and_the_template_s_marks_are_control_tokens() -> None:
    assert set(CONTROL.everywhere) == {*EVERYWHERE}
    assert set(CONTROL.markup) == {"<think>", "<tool_call>"}


@given(texts, st.sampled_from(["system", "developer", "user", "assistant", "tool"]))
def test_no_text_holds_a_control_token_afterwards(text: str, role: str) -> None:
    (message,) = CONTROL.defuse([{"role": role, "content": text, "name": text}])
    for token in EVERYWHERE:
        assert token not in message["content"]
        assert token not in message["name"]
    if role in ("user", "tool"):
        assert "<think>" not in message["content"]
    # Nothing but spaces is added, and doing it again changes nothing.
    assert message["content"].replace(" ", "") == text.replace(" ", "")
    assert CONTROL.defuse([message]) == [message]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_other_text_is_left_as_it_is(text: str) -> None:
    message = {"role": "user", "content": text}
    if not any(token in text for token in (*EVERYWHERE, *CONTROL.markup)):
        assert CONTROL.defuse([message])[0] is message


@given(texts)
def test_the_quick_look_misses_none(text: str) -> None:
    if any(token in text for token in (*EVERYWHERE, *CONTROL.markup)):
        assert CONTROL.may_be_in(to_json({"content": text}))


# Tokens of characters that JSON can spell in several ways.
ESCAPABLE = ControlTokens((*SPECIAL, 'q"q', "b\\b", "n\nn", "f\ff"))


def spellings(character: str) -> list[str]:
    """Every way in which a JSON text may write a character."""
    code = f"{ord(character):04x}"
    short = {'"': '"', "\\": "\\", "/": "/", "\n": "n", "\f": "f"}.get(character)
    plain = [] if character in '"\\\n\f' else [character]
    return [*plain, f"\\u{code}", f"\\u{code.upper()}", *([f"\\{short}"] if short else [])]


@given(st.sampled_from(ESCAPABLE.everywhere), st.data())
def test_the_quick_look_misses_no_spelling_in_a_tool_call_s_arguments(
    token: str, data: st.DataObject
) -> None:
    written = "".join(data.draw(st.sampled_from(spellings(character))) for character in token)
    arguments = f'{{"x": "{written}"}}'
    assert json.loads(arguments) == {"x": token}
    assert ESCAPABLE.may_be_in(to_json({"arguments": arguments}))


def test_the_quick_look_lets_ordinary_text_pass() -> None:
    assert not CONTROL.may_be_in(to_json({"content": "if a < b: <b>fett</b> \u2028 | [INSTALL]"}))
    assert not ControlTokens().may_be_in(to_json({"content": "<|im_end|>"}))


@pytest.mark.parametrize("arguments", ['{"q": "\\u003c|im_end|>"}', '{"<|im_end|>": ["</s>"]}'])
def test_a_tool_call_s_arguments_are_read_first(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (made,) = CONTROL.defuse([message])
    read = json.loads(made["tool_calls"][0]["function"]["arguments"])
    assert not any(token in said(read) for token in SPECIAL)
    assert CONTROL.may_be_in(to_json(message))


def test_tools_are_defused_in_names_keys_and_descriptions() -> None:
    tool = {"function": {"name": "</s>", "description": "<think>", "parameters": {"<s>": [1, "x"]}}}
    (made,) = CONTROL.defuse_tools([tool]) or []
    assert not any(token in said(made) for token in (*SPECIAL, "<think>"))
    assert list(made["function"]) == ["name", "description", "parameters"]


def test_what_a_model_writes_itself_stays_in_its_answers_and_in_system_prompts() -> None:
    for role in ("assistant", "system"):
        message = {"role": role, "content": "<think>so</think> <tool_call>"}
        assert CONTROL.defuse([message]) == [message]
