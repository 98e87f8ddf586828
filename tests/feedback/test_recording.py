"""Ends of answers: of those that go on, and of those that somebody else has ended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from sqlalchemy import func, select

from feedback.answers import EarlierAnswer, delete_answer
from feedback.db import Database, Driver
from feedback.judgements import NewJudgement, judge
from feedback.people import Viewer
from feedback.recording import (
    GATEWAY_STOPPED,
    EndedAnswer,
    StartedAnswer,
    interrupt_started,
    record_ended,
    record_started,
    record_undelivered,
)
from feedback.tables import Answer, AnswerContinuation, AnswerStatus, AnswerText, Conversation
from tests.feedback.record import ask, make_viewer
from tests.rows import started_answer

SAID: dict[str, Any] = {
    "index": 0,
    "message": {"role": "assistant", "content": "Water"},
    "finish_reason": "stop",
}


def test_the_end_from_the_gateway_itself_wins_over_that_of_a_stopped_one(
    database: Database,
) -> None:
    ending = EndedAnswer("a1", AnswerStatus.COMPLETE, [SAID], ["0" * 32], completion_tokens=1)
    late = EndedAnswer("a1", AnswerStatus.FAILED, [], error_code="engine_error")
    with database.write() as session:
        ask(session, make_viewer(session, "ana"), status=None, answer_id="a1", gateway="gw_1")
    with database.write() as session:
        assert interrupt_started(session, "gw_1") == 1
    with database.write() as session:
        record_ended(Driver.of(session), [ending])
    with database.write() as session:
        record_ended(Driver.of(session), [late])
    with database.read() as session:
        answer = session.get_one(Answer, "a1")
        assert (answer.status, answer.error_code) == (AnswerStatus.COMPLETE, None)
        assert (answer.completion_tokens, answer.ended_at) == (1, ending.ended_at)
        assert session.get_one(AnswerText, "a1").choices == [SAID]
        assert session.scalar(select(func.count()).select_from(AnswerContinuation)) == 1


@pytest.mark.parametrize(("judged", "revision"), [(True, 2), (False, 0)])
def test_what_was_extracted_of_an_answer_that_goes_on_after_all_is_extracted_again(
    sqlite_database: Database, judged: bool, revision: int
) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, status=None, answer_id="a1")
        interrupt_started(session)
        if judged:
            judge(session, ana, NewJudgement("rating", True, completion_id="a1"))
        record_ended(Driver.of(session), [EndedAnswer("a1", AnswerStatus.COMPLETE, [])])
    with sqlite_database.read() as session:
        assert session.get_one(Answer, "a1").revision == revision


def test_what_was_extracted_of_an_answer_that_was_not_sent_after_all_is_extracted_again(
    database: Database,
) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        for answer_id in ("a1", "a2"):
            ask(session, ana, answer_id=answer_id)
        judge(session, ana, NewJudgement("rating", True, completion_id="a1"))
        record_undelivered(Driver.of(session), ["a1", "a2"])
    with database.read() as session:
        found = {answer.id: answer for answer in session.scalars(select(Answer))}
        assert {answer.status for answer in found.values()} == {AnswerStatus.INTERRUPTED}
        assert (found["a1"].revision, found["a2"].revision) == (2, 0)


def test_an_answer_that_is_interrupted_for_another_reason_is_not_ended_again(
    sqlite_database: Database,
) -> None:
    with sqlite_database.write() as session:
        ask(session, make_viewer(session, "ana"), status=None, answer_id="a1")
        for code, status in (
            ("client_left", AnswerStatus.INTERRUPTED),
            (None, AnswerStatus.COMPLETE),
        ):
            record_ended(Driver.of(session), [EndedAnswer("a1", status, [], error_code=code)])
    with sqlite_database.read() as session:
        answer = session.get_one(Answer, "a1")
        assert (answer.status, answer.error_code) == (AnswerStatus.INTERRUPTED, "client_left")


def test_an_answer_that_its_gateway_is_ending_is_not_waited_for(
    postgres_database: Database,
) -> None:
    with postgres_database.write() as session:
        ana = make_viewer(session, "ana")
        for name in ("a1", "a2"):
            ask(session, ana, status=None, answer_id=name, gateway="gw_1")
    with postgres_database.write() as gateway:
        record_ended(Driver.of(gateway), [EndedAnswer("a1", AnswerStatus.COMPLETE, [])])
        with postgres_database.write() as observer:
            assert interrupt_started(observer, "gw_1") == 1
    with postgres_database.read() as session:
        found = {a.id: a.error_code for a in session.scalars(select(Answer))}
    assert found == {"a1": None, "a2": GATEWAY_STOPPED}


def test_two_gateways_that_meet_the_same_new_conversations_both_record(
    postgres_database: Database,
) -> None:
    names = ["chat-1", "chat-2"]
    with postgres_database.write() as session:
        ana = make_viewer(session, "ana")
    second_asks = Event()

    def second() -> None:
        with postgres_database.write() as session:
            session.connection()
            second_asks.set()
            for name in names:
                ask(session, ana, answer_id=f"second {name}", external_id=name)

    with ThreadPoolExecutor() as pool:
        with postgres_database.write() as session:
            for name in names:
                ask(session, ana, answer_id=f"first {name}", external_id=name)
            there = pool.submit(second)
            assert second_asks.wait(10)
        there.result(10)
    with postgres_database.read() as session:
        found = session.execute(
            select(Conversation.external_id, func.count(Answer.id))
            .join(Answer, Answer.conversation_id == Conversation.id)
            .group_by(Conversation.external_id)
            .order_by(Conversation.external_id)
        ).all()
    assert [tuple(row) for row in found] == [("chat-1", 2), ("chat-2", 2)]


def test_new_conversations_are_made_in_one_order_whatever_order_they_come_in(
    postgres_database: Database,
) -> None:
    """Two gateways that meet the same two at once would otherwise wait for each other."""
    with postgres_database.write() as session:
        ana = make_viewer(session, "ana")
    rows = [
        [started(ana, f"{gateway} {name}", external_conversation_id=name) for name in names]
        for gateway, names in (("gw_1", ["b", "a", "c"]), ("gw_2", ["c", "b", "a"]))
    ]
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda batch: _record(postgres_database, batch), rows):
            pass
    with postgres_database.read() as session:
        assert session.scalar(select(func.count()).select_from(Conversation)) == 3
        assert session.scalar(select(func.count()).select_from(Answer)) == 6


def test_a_conversation_that_is_deleted_while_it_goes_on_is_begun_anew(database: Database) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, answer_id="a1")
    with database.read() as session:
        gone = session.get_one(Answer, "a1").conversation_id
    later = started(ana, "a2", earlier=EarlierAnswer("a1", gone, "assistant", "assistant@0"))
    with database.write() as session:
        delete_answer(session, session.get_one(Answer, "a1"))
    _record(database, [later])
    with database.read() as session:
        assert session.get_one(Answer, "a2").conversation_id != gone


def test_a_conversation_that_goes_on_while_its_last_answer_is_deleted_stays(
    postgres_database: Database,
) -> None:
    with postgres_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, answer_id="a1")
        kept = session.get_one(Answer, "a1").conversation_id
    later = started(ana, "a2", earlier=EarlierAnswer("a1", kept, "assistant", "assistant@0"))
    deleting = Event()

    def delete() -> None:
        with postgres_database.write() as session:
            answer = session.get_one(Answer, "a1")
            deleting.set()
            delete_answer(session, answer)

    with ThreadPoolExecutor() as pool:
        with postgres_database.write() as session:
            record_started(Driver.of(session), [later])
            done = pool.submit(delete)
            assert deleting.wait(10)
        done.result(10)
    with postgres_database.read() as session:
        assert session.scalars(select(Answer.id)).all() == ["a2"]


def started(viewer: Viewer, answer_id: str, **more: Any) -> StartedAnswer:
    columns = {"id": answer_id, "gateway": "gw_1", "prefix_hash": answer_id, **more}
    return started_answer(viewer.person_id, **columns)


def _record(database: Database, batch: list[StartedAnswer]) -> None:
    with database.write() as session:
        record_started(Driver.of(session), batch)
