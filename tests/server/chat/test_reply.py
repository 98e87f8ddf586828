"""What engines say: names in bytes, events, forms of events, what was heard."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.chat.reply import Heard, choices_of, parse
from server.chat.stream import DONE, LARGEST_EVENT, Events, Forms, Names
from server.errors import EngineFault


def split(*parts: bytes) -> list[bytes]:
    events = Events()
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
    renamed = Names(engine_name, 'as"sis@1é %b').put_into(raw)
    assert json.loads(renamed.decode("utf-8", "surrogatepass")) == {
        **answer,
        "model": 'as"sis@1é %b',
    }


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


@pytest.mark.parametrize(
    ("stop_reason", "recorded"),
    [("User:", {"stop_reason": "User:"}), (128009, {}), (None, {}), ({"a": 1}, {})],
)
def test_a_text_of_the_request_that_ended_an_answer_is_recorded(
    stop_reason: Any, recorded: dict[str, str]
) -> None:
    """A number is a token of the model's own, by which it ended by itself."""
    ended = {"index": 0, "finish_reason": "stop", "stop_reason": stop_reason}
    message = {"role": "assistant", "content": "a"}
    expected = [{"index": 0, "message": message, "finish_reason": "stop", **recorded}]
    whole, streamed = Heard(chat=True), Heard(chat=True)
    assert whole.hear_whole([{**ended, "message": message}]) == expected
    streamed.hear([{**ended, "delta": {"content": "a"}}])
    assert streamed.choices() == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
CALL = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}
SAID = {"role": "assistant", "content": "a", "reasoning": "b", "tool_calls": [CALL]}
ANSWERS = {
    (chat, whole): {
        "model": "tiny",
        "usage": {"total_tokens": 3},
        "choices": [
            {"index": 0, "finish_reason": "stop"}
            | ({("message" if whole else "delta"): SAID} if chat else {"text": "a"})
        ],
    }
    for chat in (True, False)
    for whole in (True, False)
}


def places_of(found: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside of a JSON value."""
    inner = found.items() if isinstance(found, dict) else enumerate(found)
    for key, value in inner:
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in places_of(value))


@given(st.sampled_from(sorted(ANSWERS)), JSON, st.data())
def test_whatever_stands_in_an_answer_s_place_is_heard_or_the_engine_s_fault(
    kind: tuple[bool, bool], other: Any, data: st.DataObject
) -> None:
    chat, whole = kind
    answer = copy.deepcopy(ANSWERS[kind])
    *path, last = data.draw(st.sampled_from(list(places_of(answer))))
    place: Any = answer
    for key in path:
        place = place[key]
    place[last] = other
    heard = Heard(chat=chat)
    try:
        choices = choices_of(answer, chat=chat, choices=1, whole=whole)
    except EngineFault:
        return
    if whole:
        recorded = heard.hear_whole(choices)
    else:
        heard.hear(choices)
        recorded = heard.choices()
        Forms(heard, Names("tiny", "assistant@1")).learn(
            b"data: %b\n\n" % json.dumps(answer).encode(), answer
        )
    assert all(isinstance(text, str) for texts in heard.texts.values() for text in texts)
    assert len(recorded) == len({choice["index"] for choice in choices})
    assert heard.thoughts() is None or chat


@pytest.mark.parametrize("kind", sorted(ANSWERS))
def test_a_right_answer_passes_and_one_with_fewer_choices_than_asked_does_not(
    kind: tuple[bool, bool],
) -> None:
    chat, whole = kind
    answer = ANSWERS[kind]
    assert choices_of(answer, chat=chat, choices=1, whole=whole) is answer["choices"]
    if whole:
        with pytest.raises(EngineFault, match="1 choices, 2 were asked for"):
            choices_of(answer, chat=chat, choices=2, whole=whole)
    else:
        assert choices_of(answer, chat=chat, choices=2, whole=whole) is answer["choices"]


PIECES = st.one_of(
    st.text(), st.sampled_from(["another text", '"', "\\", "\n", '","content":"', "}"])
)
DELTAS = st.one_of(
    st.fixed_dictionaries({"content": PIECES}),
    st.fixed_dictionaries({"reasoning": PIECES}),
    st.fixed_dictionaries({"content": PIECES, "reasoning_content": PIECES}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": PIECES}),
    st.just({"tool_calls": [{"index": 0, "function": {"name": "a", "arguments": "{}"}}]}),
)


@given(
    st.lists(st.tuples(st.integers(0, 1), DELTAS, st.sampled_from([None, None, None, "stop"]))),
    st.booleans(),
    st.sampled_from([(",", ":"), (", ", ": ")]),
)
def test_an_event_that_is_heard_by_its_form_says_what_it_says_when_parsed(
    said: list[tuple[int, dict[str, Any], str | None]],
    ascii_only: bool,
    separators: tuple[str, str],
) -> None:
    names = Names("tiny", "assistant@1")
    heard, parsed = Heard(chat=True), Heard(chat=True)
    forms = Forms(heard, names)
    for index, delta, finish in said:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        event = {"id": "x", "model": "tiny", "choices": [choice], "content": "another"}
        text = json.dumps(event, ensure_ascii=ascii_only, separators=separators)
        raw = b"data: %b\n\n" % text.encode("utf-8", "surrogatepass")
        renamed = names.put_into_event(raw)
        parsed.hear([choice])
        by_form = forms.hear(raw)
        if by_form is None:
            heard.hear([choice])
            forms.learn(raw, event)
        else:
            assert by_form == renamed
    assert heard.choices() == parsed.choices()
    assert heard.thoughts() == parsed.thoughts()


def stream_event(content: str, more: str = "") -> bytes:
    return b'data: {"model":"tiny","choices":[{"index":0,"delta":{"content":"%b"}}]%b}\n\n' % (
        content.encode(),
        more.encode(),
    )


def test_events_alike_but_for_their_text_are_parsed_once() -> None:
    heard = Heard(chat=True)
    forms = Forms(heard, Names("tiny", "assistant@1"))
    first = stream_event("Hel")
    assert forms.hear(first) is None
    found = parse(first[6:])
    heard.hear(found["choices"])
    forms.learn(first, found)
    assert forms.hear(stream_event("lo\\n")) == stream_event("lo\\n").replace(
        b"tiny", b"assistant@1"
    )
    assert heard.choices()[0]["message"]["content"] == "Hello\n"


@pytest.mark.parametrize(
    "event",
    [
        stream_event("a", ',"error":"x"'),
        stream_event('a","reasoning":"b'),
        stream_event("a\\"),
        stream_event("a\nb"),
        stream_event(""),
        stream_event("a").replace(b"tiny", b"other"),
        DONE,
    ],
)
def test_an_event_of_no_known_form_is_left_to_the_parser(event: bytes) -> None:
    heard = Heard(chat=True)
    forms = Forms(heard, Names("tiny", "assistant@1"))
    first = stream_event("x")
    found = parse(first[6:])
    heard.hear(found["choices"])
    forms.learn(first, found)
    assert forms.hear(event) is None
    assert heard.choices()[0]["message"]["content"] == "x"


def test_a_form_is_not_learned_where_the_text_may_stand_elsewhere() -> None:
    heard = Heard(chat=True)
    forms = Forms(heard, Names("tiny", "assistant@1"))
    twice = b'data: {"model":"tiny","x":{"content":"a"},"choices":[{"index":0,"delta":%b}]}\n\n'
    for delta in (b'{"content":"a"}', b'{"content":"\\u0061"}'):
        event = twice % delta
        found = parse(event[6:])
        heard.hear(found["choices"])
        forms.learn(event, found)
        assert forms.hear(event) is None
