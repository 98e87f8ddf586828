"""Answers: which conversation they belong to, what is kept of them, who finds them again."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select

from feedback.answers import (
    delete_answer,
    get_answer,
    get_metadata,
    get_text,
    list_answers,
    messages_hash,
    root_hash,
    set_metadata,
    text_of,
)
from feedback.canonical import canonical_json
from feedback.comparisons import NewComparison, compare
from feedback.db import Database, Driver
from feedback.errors import NotFound
from feedback.formats.messages import join_parts
from feedback.judgements import NewJudgement, judge
from feedback.recording import EndedAnswer, interrupt_started, record_ended
from feedback.tables import (
    Answer,
    AnswerContinuation,
    AnswerKind,
    AnswerStatus,
    AnswerText,
    Comparison,
    Conversation,
    Judgement,
)
from tests.feedback.record import ask, make_viewer, turns


def test_conversations_that_differ_in_a_refusal_are_two() -> None:
    one, other = (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": text}]}]
        for text in ("I can't.", "I won't.")
    )
    assert messages_hash("p", one) != messages_hash("p", other)
    assert text_of(one[0]["content"]) == join_parts(one[0]["content"]) == "I can't."


@given(
    st.sampled_from(["user", "assistant", "tool", "prompt", 'a "role"', None]),
    st.text() | st.none(),
    st.none() | st.text(),
    st.lists(st.fixed_dictionaries({"id": st.text(max_size=5)}), max_size=1),
)
def test_a_hash_is_that_of_the_canonical_form_of_each_message(
    role: str | None, text: str | None, answered: str | None, calls: list[dict[str, Any]]
) -> None:
    message = {"role": role, "content": text, "tool_call_id": answered, "tool_calls": calls}
    named = [[call["id"], None, None] for call in calls]
    line = canonical_json([role, (text or "").strip(), named, answered])
    expected = hashlib.sha256(b"p" + line.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    assert messages_hash("p", [message]) == expected


def test_the_text_of_parts_has_a_line_for_each() -> None:
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "A river."},
        "stray",
    ]
    assert [text_of(content) for content in (parts, "One", None)] == ["Look:\nA river.", "One", ""]


def places(database: Database) -> dict[str, Answer]:
    with database.read() as session:
        return {answer.id: answer for answer in session.scalars(select(Answer))}


def test_a_request_that_carries_an_answer_continues_its_conversation(database: Database) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, "Hi", "Hello!", answer_id="a1")
        ask(session, ana, "Bye", "Ciao", history=turns("Hi", " Hello! "), answer_id="a2")
        ask(session, ana, "Bye", "Ciao", history=turns("Hi", "Never said"), answer_id="a3")
    found = places(database)
    assert found["a2"].conversation_id == found["a1"].conversation_id
    assert (found["a2"].parent_id, found["a2"].regenerates_id) == ("a1", None)
    assert found["a3"].conversation_id != found["a1"].conversation_id
    assert found["a3"].parent_id is None


def test_each_of_several_choices_can_be_continued(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, "Hi", ["One", "Two"], answer_id="a1")
        for number, said in enumerate(("One", "Two")):
            ask(session, ana, "More", history=turns("Hi", said), answer_id=f"b{number}")
    found = places(sqlite_database)
    assert [found[name].parent_id for name in ("b0", "b1")] == ["a1", "a1"]


def test_the_same_messages_again_regenerate_the_newest_answer(database: Database) -> None:
    with database.write() as session:
        ana, ben = make_viewer(session, "ana"), make_viewer(session, "ben")
        for name in ("a1", "a2", "a3"):
            ask(session, ana, "Hi", answer_id=name)
        ask(session, ben, "Hi", answer_id="b1")
    found = places(database)
    assert [found[name].regenerates_id for name in ("a1", "a2", "a3", "b1")] == [
        None,
        "a1",
        "a2",
        None,
    ]
    assert len({found[name].conversation_id for name in ("a1", "a2", "a3")}) == 1
    assert found["b1"].conversation_id != found["a1"].conversation_id


def test_nobody_continues_the_conversation_of_another_person(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana, ben = make_viewer(session, "ana"), make_viewer(session, "ben")
        ask(session, ana, "Hi", "Hello!", answer_id="a1", external_id="chat-1")
        ask(
            session,
            ben,
            "Bye",
            history=turns("Hi", "Hello!"),
            answer_id="b1",
            external_id="chat-1",
        )
    found = places(sqlite_database)
    assert found["b1"].parent_id is None
    assert found["b1"].conversation_id != found["a1"].conversation_id


def test_the_clients_own_name_holds_a_conversation_together(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, "Hi", "Hello!", answer_id="a1", external_id="chat-1")
        # A front end that shortens the history: only the name tells.
        ask(
            session,
            ana,
            "Bye",
            history=turns("(summary)", "(so far)"),
            answer_id="a2",
            external_id="chat-1",
        )
        ask(session, ana, "Hi", answer_id="a3", external_id="chat-2")
    found = places(sqlite_database)
    assert found["a2"].conversation_id == found["a1"].conversation_id
    assert found["a2"].parent_id == "a1"
    assert found["a3"].conversation_id != found["a1"].conversation_id
    assert found["a3"].regenerates_id is None


def test_an_ended_answer_is_not_ended_again(database: Database) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, "Hi", "Hello!", answer_id="a1")
        late: Any = {"index": 0, "message": {"role": "assistant", "content": "Too late"}}
        ending = EndedAnswer("a1", AnswerStatus.FAILED, [late], ["0" * 32])
        record_ended(Driver.of(session), [ending, ending])
    with database.read() as session:
        answer = session.get_one(Answer, "a1")
        choices = session.get_one(AnswerText, "a1").choices
        assert answer.status == AnswerStatus.COMPLETE
        assert choices is not None
        assert choices[0]["message"]["content"] == "Hello!"
        assert session.scalar(select(func.count()).select_from(AnswerContinuation)) == 1


def test_a_stopped_gateways_answers_are_interrupted_and_others_go_on(
    sqlite_database: Database,
) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, status=None, answer_id="a1")
        ask(session, ana, status=None, answer_id="a2", gateway="gw_2")
        assert interrupt_started(session, "gw_1") == 1
    found = places(sqlite_database)
    assert (found["a1"].status, found["a1"].error_code) == ("interrupted", "gateway_stopped")
    assert found["a2"].status == AnswerStatus.STARTED


def test_the_text_of_an_answer_that_is_not_stored_is_nowhere(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, stored=False, answer_id="a1")
        answer = get_answer(session, "a1", ana)
        with pytest.raises(NotFound, match="not stored"):
            get_text(session, answer)
        assert list_answers(session, ana) == ([], False)


def test_somebody_elses_answer_is_not_found(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana, ben = make_viewer(session, "ana"), make_viewer(session, "ben")
        ask(session, ana, answer_id="a1")
        for answer_id in ("a1", "a2"):
            with pytest.raises(NotFound, match="of yours"):
                get_answer(session, answer_id, ben)
        with pytest.raises(NotFound):
            list_answers(session, ben, after="a1")


def test_lists_page_in_both_directions_and_filter(database: Database) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        for number in range(5):
            team = {"team": "red" if number % 2 else "blue", "n": str(number)}
            ask(session, ana, f"Q{number}", answer_id=f"a{number}", metadata=team)
        ask(session, ana, answer_id="a5", status=None)
        ask(session, ana, answer_id="a6", kind=AnswerKind.TASK)
        ask(session, ana, answer_id="a7", deployment="poet")

        def pages(**filters: Any) -> list[list[str]]:
            seen: list[list[str]] = []
            after, more = None, True
            while more:
                rows, more = list_answers(session, ana, after=after, limit=2, **filters)
                seen.append([row.id for row in rows])
                after = rows[-1].id if rows else None
            return seen

        assert pages() == [["a0", "a1"], ["a2", "a3"], ["a4", "a7"]]
        assert pages(descending=True) == [["a7", "a4"], ["a3", "a2"], ["a1", "a0"]]
        assert pages(model="poet@0") == pages(model="poet") == [["a7"]]
        assert pages(metadata={"team": "red"}) == [["a1", "a3"]]
        assert pages(metadata={"team": "red", "n": "3"}) == [["a3"]]
        assert pages(metadata={"team": "green"}) == [[]]


def test_new_metadata_takes_the_place_of_the_old(database: Database) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, answer_id="a1", metadata={"team": "red", "n": "1"})
    with database.write() as session:
        set_metadata(session, session.get_one(Answer, "a1"), {"team": "blue"})
    with database.read() as session:
        assert get_metadata(session, ["a1", "a9"]) == {"a1": {"team": "blue"}, "a9": {}}


def test_a_deleted_answer_takes_its_verdicts_and_its_empty_conversation_along(
    database: Database,
) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        for name in ("a1", "a2"):
            ask(session, ana, "Hi", f"Hello {name}", answer_id=name)
            judge(session, ana, NewJudgement("rating", True, completion_id=name))
        compare(session, ana, NewComparison(("a1", "a2"), "a"))
        conversation_id = session.get_one(Answer, "a1").conversation_id
        about = NewJudgement("comment", "Well done", conversation_id=conversation_id)
        judge(session, ana, about)
    left = []
    for name in ("a1", "a2"):
        with database.write() as session:
            delete_answer(session, get_answer(session, name, ana))
        with database.read() as session:
            left.append(
                [
                    session.scalar(select(func.count()).select_from(table))
                    for table in (Answer, AnswerText, Judgement, Comparison, Conversation)
                ]
            )
    assert left == [[1, 1, 2, 0, 1], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"content": "Hi"}, {"content": " Hi\n"}, True),
        ({"content": "Hi"}, {"content": [{"type": "text", "text": "Hi"}]}, True),
        ({"content": "Hi"}, {"content": "Hi", "name": "ana"}, True),
        ({"content": "Hi"}, {"content": "hi"}, False),
        ({"content": "Hi"}, {"role": "assistant", "content": "Hi"}, False),
        (
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
            {"tool_calls": [{"id": "1", "function": {"name": "g", "arguments": "{}"}}]},
            False,
        ),
        ({"content": "4", "tool_call_id": "1"}, {"content": "4", "tool_call_id": "2"}, False),
    ],
)
def test_a_conversation_is_told_by_what_was_said_in_it(
    one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    hashes = [messages_hash("ana", [{"role": "user", **message}]) for message in (one, other)]
    assert (hashes[0] == hashes[1]) is same
    assert messages_hash("ben", [{"role": "user", **one}]) != hashes[0]


def test_the_root_is_the_first_user_turn_in_normal_form() -> None:
    root = root_hash(turns("What is  Rain?", "Water", "And snow?"))
    assert root == root_hash([{"role": "system", "content": "x"}, *turns("what is rain?\n")])
    assert root != root_hash(turns("What is snow?"))
