"""Ends of answers: of those that go on, and of those that somebody else has ended."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from feedback.db import Database, Driver
from feedback.judgements import NewJudgement, judge
from feedback.recording import (
    GATEWAY_STOPPED,
    EndedAnswer,
    interrupt_started,
    record_ended,
    record_undelivered,
)
from feedback.tables import Answer, AnswerContinuation, AnswerStatus, AnswerText
from tests.feedback.record import ask, make_viewer

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
