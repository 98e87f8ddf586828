"""The parts of an answer's way that need no engine: names in bytes, events, what was heard."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import EngineFault
from server.proxy import LARGEST_EVENT, Heard, _Events, _renames


def split(*parts: bytes) -> list[bytes]:
    events = _Events()
    return [event for part in parts for event in events.split(part)]


STREAM = b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_are_whole_wherever_the_network_cuts(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(STREAM)]
    parts = [STREAM[a:b] for a, b in pairwise(ends)]
    events = split(*parts)
    assert b"".join(events) == STREAM
    assert len(events) == 3


def test_half_an_event_at_the_end_is_no_event() -> None:
    assert split(STREAM + b'data: {"c"') == split(STREAM)


def test_an_endless_event_is_a_fault() -> None:
    with pytest.raises(EngineFault):
        split(*[b"x" * (LARGEST_EVENT // 2)] * 3)


@given(st.text(min_size=1), st.text(), st.booleans(), st.sampled_from([(",", ":"), (", ", ": ")]))
def test_the_public_name_replaces_the_field_and_nothing_that_was_said(
    engine_name: str, content: str, plain: bool, separators: tuple[str, str]
) -> None:
    said = f'{content} "model":"{engine_name}" {engine_name}'
    answer = {"id": "x", "model": engine_name, "choices": [{"delta": {"content": said}}]}
    raw = json.dumps(answer, ensure_ascii=plain, separators=separators).encode(
        "utf-8", "surrogatepass"
    )
    old, new = next((o, n) for o, n in _renames(engine_name, 'as"sis@1é') if o in raw)
    renamed = json.loads(raw.replace(old, new, 1).decode("utf-8", "surrogatepass"))
    assert renamed == {**answer, "model": 'as"sis@1é'}


def test_a_stream_is_put_together_by_choice_with_thoughts_and_tool_calls() -> None:
    heard = Heard(chat=True)

    def delta(index: int, finish: str | None = None, **said: Any) -> None:
        heard.hear([{"index": index, "delta": said, "finish_reason": finish}])

    def call(index: int, name: str | None, arguments: str, id: str | None = None) -> None:
        function = {"name": name, "arguments": arguments}
        delta(1, tool_calls=[{"index": index, "id": id, "function": function}])

    delta(0, role="assistant", content="")
    delta(1, role="assistant", content=None)
    assert heard.first_token_at is None
    delta(0, reasoning="hm")
    assert heard.first_token_at is not None
    delta(0, content="Hel")
    call(0, "look", '{"a"', "call_1")
    call(1, "see", "{}", "call_2")
    call(0, None, ":1}")
    delta(0, content="lo", finish="stop")
    delta(1, finish="tool_calls")
    assert heard.choices() == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "finish_reason": "stop",
        },
        {
            "index": 1,
            "message": {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "look", "arguments": '{"a":1}'},
                        "id": "call_1",
                    },
                    {
                        "type": "function",
                        "function": {"name": "see", "arguments": "{}"},
                        "id": "call_2",
                    },
                ],
            },
            "finish_reason": "tool_calls",
        },
    ]
    assert heard.thoughts() == ["hm", None]
