"""From rows to token ids: what is taught, what is dropped, what is held back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.tuner.training.runs import example
from tuner.training.data import (
    DataError,
    Renderer,
    Row,
    group_of,
    read_rows,
    split_validation,
)

END = 2
USER = {"role": "user", "content": "Hi"}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def read(folder: Path, *rows: dict[str, Any]) -> list[Row]:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return read_rows([file])


def test_both_dialects_teach_the_same(tmp_path: Path, tokenizer: Any) -> None:
    rows = read(
        tmp_path,
        {"prompt": [USER], "completion": [assistant("Yes")]},
        {"messages": [USER, assistant("Yes")]},
        {"prompt": [USER], "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        {
            "input": {"messages": [USER]},
            "preferred_output": [assistant("Yes")],
            "non_preferred_output": [assistant("No")],
        },
    )
    renderer = Renderer(tokenizer, [END], max_length=400)
    rendered = renderer.render(rows, frozenset({"supervised", "preference"}))
    one, chat, pair, other_pair = rendered.examples
    assert (one.prompt, one.completions) == (chat.prompt, chat.completions)
    assert (pair.prompt, pair.completions) == (other_pair.prompt, other_pair.completions)
    assert pair.completions[0] == one.completions[0]


def test_training_text_is_served_text_up_to_the_end_of_the_turn(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = read(tmp_path, {"prompt": [USER], "completion": [assistant("Yes")]})
    renderer = Renderer(tokenizer, [END], max_length=400)
    (found,) = renderer.render(rows, frozenset({"supervised"})).examples
    assert found.prompt == renderer.render_prompt([USER])
    # The template's newline after the end token is never generated, so it isn't taught.
    assert tokenizer.decode(list(found.completions[0])) == "Yes<|im_end|>"


def test_every_answer_of_a_conversation_teaches_but_those_of_weight_0(tmp_path: Path) -> None:
    turns = [USER, assistant("One", weight=0), USER, assistant("Two"), USER, assistant("Three")]
    rows = read(tmp_path, {"id": "c", "messages": turns})
    assert [(row.id, len(row.prompt)) for row in rows] == [("c#3", 3), ("c#5", 5)]


REASONS: dict[str, dict[str, Any]] = {
    "other_kind": {"prompt": [USER], "completion": [assistant("Yes")], "label": True},
    "template_mismatch": {
        "prompt": [USER],
        "completion": [assistant("Yes")],
        "prompt_tokens": 3,
    },
    "too_long": {"prompt": [USER], "completion": [assistant("x" * 500)]},
    "empty": {"prompt": [USER], "completion": [assistant("")]},
}


@pytest.mark.parametrize(("reason", "row"), REASONS.items(), ids=REASONS)
def test_what_cannot_be_taught_is_counted_by_reason(
    tmp_path: Path, tokenizer: Any, reason: str, row: dict[str, Any]
) -> None:
    good = {"prompt": [USER], "completion": [assistant("Yes")]}
    renderer = Renderer(tokenizer, [END], max_length=400)
    rendered = renderer.render(read(tmp_path, row, good), frozenset({"supervised"}))
    assert (len(rendered.examples), rendered.drops) == (1, {reason: 1})


def test_a_prompt_as_long_as_it_was_served_is_kept(tmp_path: Path, tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, [END], max_length=400)
    length = len(renderer.render_prompt([USER]))
    row = {"prompt": [USER], "completion": [assistant("Yes")], "prompt_tokens": length}
    assert renderer.render(read(tmp_path, row), frozenset({"supervised"})).drops == {}


def test_a_conversation_that_the_template_refuses_is_dropped(
    tmp_path: Path, tiny_model: Path
) -> None:
    strict = AutoTokenizer.from_pretrained(tiny_model)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + strict.chat_template
    )
    rows = read(
        tmp_path,
        {"prompt": [{"role": "system", "content": "x"}, USER], "completion": [assistant("Yes")]},
    )
    rendered = Renderer(strict, [END], max_length=400).render(rows, frozenset({"supervised"}))
    assert rendered.drops == {"template_refused": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: found list, expected an object"),
        ('{"prompt": []}', "line 2: kind is None"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
        (
            '{"prompt": [{"role": "user", "content": "x"}], "completion": [], "weight": 1}',
            "'completion' is",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}], "completion": '
            '[{"role": "assistant", "content": "y"}], "weight": -1}',
            "'weight' is -1",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    good = json.dumps({"prompt": [USER], "completion": [assistant("Yes")]})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=said):
        read_rows([tmp_path / "rows.jsonl"])


def test_spacing_and_case_make_no_other_group() -> None:
    assert group_of([USER]) == group_of([{"role": "user", "content": "  hI "}])
    assert group_of([USER]) != group_of([{"role": "user", "content": "Ho"}])


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 10))
def test_groups_are_never_divided_between_training_and_validation(
    numbers: list[int], minimum: int
) -> None:
    examples = [
        example((5,), (6, 2), name=group_of([{"role": "user", "content": str(number)}]))
        for number in numbers
    ]
    training, validation = split_validation(examples, share=0.3, minimum=minimum)
    assert len(training) + len(validation) == len(examples)
    assert not {one.group for one in training} & {one.group for one in validation}
    assert validation == [] or len(validation) >= minimum
    assert training or not examples
    # Further examples move none from one side to the other, once there is a slice.
    if validation:
        more, held = split_validation([*examples, examples[0]], share=0.3, minimum=minimum)
        assert {one.group for one in held} == {one.group for one in validation}
        assert {one.group for one in more} == {one.group for one in training}
