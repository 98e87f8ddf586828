"""Judgements: said once however often they arrive, with history, and seen by whom they concern."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.db import Database
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.judgements import (
    NewJudgement,
    get_judgement,
    judge,
    list_judgement_revisions,
    list_judgements,
    withdraw,
)
from feedback.people import Viewer
from feedback.tables import Answer, Judgement, JudgementRevision
from tests.feedback.record import ask, make_viewer, turns

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def rate(session: Session, viewer: Viewer, value: Any, answer: str = "a1", **fields: Any) -> Any:
    """(judgement, new?) of a rating, or of another `kind`."""
    kind = fields.pop("kind", "rating")
    return judge(session, viewer, NewJudgement(kind, value, completion_id=answer, **fields))


@pytest.fixture
def ana(database: Database) -> Viewer:
    """Somebody who got the answer a1."""
    with database.write() as session:
        viewer = make_viewer(session, "ana")
        ask(session, viewer, answer_id="a1")
    return viewer


def test_a_verdict_that_arrives_three_times_is_one(database: Database, ana: Viewer) -> None:
    for created in (True, False, False):
        with database.write() as session:
            assert rate(session, ana, True, client_id="c1")[1] is created
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JudgementRevision)) == 1
        assert session.get_one(Answer, "a1").revision == 1


def test_a_verdict_that_arrives_three_times_at_once_is_one(database: Database, ana: Viewer) -> None:
    def send(_: int) -> str:
        with database.write() as session:
            return str(rate(session, ana, True, client_id="c1")[0].id)

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(send, range(3)))) == 1
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(JudgementRevision)) == 1


def test_a_new_value_keeps_the_row_and_the_history(database: Database, ana: Viewer) -> None:
    for value, comment in ((True, "good"), (False, None), (None, None), (True, None)):
        with database.write() as session:
            judgement, _ = rate(session, ana, value, comment=comment)
    with database.read() as session:
        said = list_judgement_revisions(session, ana, judgement.id)
        assert [(one.revision, one.value, one.comment) for one in said] == [
            (1, True, "good"),
            (2, False, None),
            (3, None, None),
            (4, True, None),
        ]
        assert session.scalars(select(Judgement)).one().value is True
        assert session.get_one(Answer, "a1").revision == 4


@on_sqlite
def test_a_late_copy_does_not_undo_a_newer_verdict(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        rate(session, ana, True, client_id="c1")
        rate(session, ana, False, client_id="c2")
        judgement, created = rate(session, ana, True, client_id="c1")
    assert (judgement.value, judgement.revision, created) == (False, 2, False)


@on_sqlite
def test_an_id_used_for_another_target_is_a_conflict(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        ask(session, ana, "Other", answer_id="a2")
        ben = make_viewer(session, "ben")
        ask(session, ben, answer_id="b1")
        rate(session, ana, True, client_id="c1")
        rate(session, ana, False, client_id="c2")
        for other in ({"answer": "a2"}, {"kind": "comment", "value": "x"}):
            with pytest.raises(Conflict, match="'c1' was used for another") as refused:
                rate(session, ana, **{"value": True, "client_id": "c1", **other})
            assert refused.value.status == 409
        assert rate(session, ben, True, "b1", client_id="c1")[1], "ids are each person's own"


@on_sqlite
def test_kinds_names_choices_and_sources_stand_side_by_side(
    database: Database, ana: Viewer
) -> None:
    with database.write() as session:
        ask(session, ana, "Two", ["One", "Two"], answer_id="a2")
        rate(session, ana, True, "a2")
        rate(session, ana, False, "a2", choice_index=1)
        rate(session, ana, 4, "a2", kind="stars")
        rate(session, ana, True, "a2", source_type="judge", source_id="m1")
        rate(session, ana, True, "a2", source_type="judge", source_id="m2")
        rate(session, ana, 1, "a2", kind="signal", name="copied")
        rate(session, ana, 1, "a2", kind="signal", name="regenerated")
        assert len(list_judgements(session, ana, completion_id="a2")[0]) == 7


def test_true_and_one_are_two_values_of_a_signal(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        rate(session, ana, True, kind="signal", name="n")
        judgement, _ = rate(session, ana, 1, kind="signal", name="n")
    assert (judgement.revision, type(judgement.value)) == (2, int)


@on_sqlite
def test_what_stands_beside_a_value_stays_until_the_value_changes(
    database: Database, ana: Viewer
) -> None:
    with database.write() as session:
        rate(session, ana, False, comment="rude", reasons=["tone"], metadata={"k": "v"})
        again, _ = rate(session, ana, False, reasons=["tone", "length"])
        assert (again.comment, again.reasons, again.metadata_, again.revision) == (
            "rude",
            ["tone", "length"],
            {"k": "v"},
            2,
        )
        other, _ = rate(session, ana, True)
        assert (other.comment, other.reasons, other.metadata_) == (None, [], {})


@on_sqlite
def test_withdrawn_is_listed_no_more_and_moves_the_answer_once(
    database: Database, ana: Viewer
) -> None:
    with database.write() as session:
        judgement, _ = rate(session, ana, False, comment="rude")
        for _ in range(3):
            assert withdraw(session, ana, judgement.id).value is None
        assert list_judgements(session, ana) == ([], False)
        assert get_judgement(session, ana, judgement.id).comment is None
        assert [one.value for one in list_judgement_revisions(session, ana, judgement.id)] == [
            False,
            None,
        ]
    with database.read() as session:
        assert session.get_one(Answer, "a1").revision == 2


@on_sqlite
def test_what_was_never_said_cannot_be_withdrawn(database: Database, ana: Viewer) -> None:
    with database.write() as session, pytest.raises(NotFound, match="no rating of 'a1'"):
        rate(session, ana, None)


def test_a_verdict_on_a_conversation_moves_none_of_its_answers(
    database: Database, ana: Viewer
) -> None:
    with database.write() as session:
        ask(session, ana, answer_id="a2")  # the same question again
        conversation_id = session.get_one(Answer, "a1").conversation_id
        about = NewJudgement("rating", True, conversation_id=conversation_id)
        assert judge(session, ana, about)[1]
        assert not judge(session, ana, about)[1]
        found, _ = list_judgements(session, ana, conversation_id=conversation_id)
        assert [one.answer_id for one in found] == [None]
        withdraw(session, ana, found[0].id)
    with database.read() as session:
        assert session.scalars(select(Answer.revision)).all() == [0, 0]


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"completion_id": "a9"}, NotFound, "'a9'"),
        ({"conversation_id": "c9"}, NotFound, "'c9'"),
        ({}, BadRequest, "either"),
        ({"completion_id": "a1", "conversation_id": "c"}, BadRequest, "either"),
        ({"completion_id": "a1", "choice_index": 1}, BadRequest, "its choices are 0"),
        ({"completion_id": "a1", "source_type": "robot"}, BadRequest, "'human'"),
    ],
)
def test_targets_that_are_refused(
    sqlite_database: Database, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, answer_id="a1")
        with pytest.raises(error, match=says):
            judge(session, ana, NewJudgement("rating", True, **fields))


def test_a_choice_may_be_judged_before_it_has_ended(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, reply=["", ""], status=None, answer_id="a1")
        assert rate(session, ana, True, choice_index=1)[1]
        with pytest.raises(BadRequest, match="its choices are 0, 1"):
            rate(session, ana, True, choice_index=2)


def test_each_kind_of_viewer_judges_and_sees_its_own_only(database: Database) -> None:
    with database.write() as session:
        ana, u1 = make_viewer(session, "ana"), make_viewer(session, "app", "u1")
        app = make_viewer(session, "app", speaks_for_many=True)
        root = make_viewer(session, "root", sees_all=True)
        poet = make_viewer(session, "root", sees_all=True, deployments=("poet",))
        ask(session, ana, answer_id="ana")
        ask(session, u1, answer_id="u1")
        ask(session, u1, answer_id="verse", deployment="poet")
        for viewer, answer in ((ana, "ana"), (app, "u1"), (app, "verse"), (root, "ana")):
            rate(session, viewer, True, answer)
        for viewer, answer in ((ana, "u1"), (u1, "ana"), (app, "ana"), (poet, "u1")):
            with pytest.raises(NotFound):
                rate(session, viewer, True, answer)

        def seen(viewer: Viewer) -> list[tuple[str | None, str]]:
            rows, _ = list_judgements(session, viewer)
            return sorted((row.answer_id, row.person_id) for row in rows)

        ana_said, root_said = ("ana", ana.person_id), ("ana", root.person_id)
        u1_said, verse_said = ("u1", u1.person_id), ("verse", u1.person_id)
        assert seen(ana) == [ana_said]
        assert seen(u1) == seen(app) == [u1_said, verse_said]
        assert seen(root) == sorted([ana_said, root_said, u1_said, verse_said])
        assert seen(poet) == [verse_said]
        mine = list_judgements(session, ana)[0][0].id
        for stranger in (u1, app, poet):
            for call in (get_judgement, withdraw, list_judgement_revisions):
                with pytest.raises(NotFound):
                    call(session, stranger, mine)


@pytest.mark.parametrize("elsewhere", ["poet", None])
def test_a_conversation_that_spans_deployments_is_judged_by_a_key_of_them_all(
    database: Database, elsewhere: str | None
) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        limited = make_viewer(session, "ana", deployments=("assistant",))
        both = make_viewer(session, "ana", deployments=("assistant", "poet"))
        root = make_viewer(session, "root", sees_all=True, deployments=("assistant",))
        answer = ask(session, ana, reply="Water.")
        conversation_id = session.get_one(Answer, answer).conversation_id
        about = NewJudgement("rating", True, conversation_id=conversation_id)
        judgement, created = judge(session, limited, about)
        assert created

        # The next turn is answered elsewhere: `None` is the base model, which is no deployment.
        next_turn = turns("What is rain?", "Water.")
        other = ask(session, ana, "More.", history=next_turn, deployment=elsewhere)
        assert session.get_one(Answer, other).conversation_id == conversation_id
        for viewer in (limited, root, *([] if elsewhere else [both])):
            for call in (get_judgement, withdraw, list_judgement_revisions):
                with pytest.raises(NotFound, match="no judgement"):
                    call(session, viewer, judgement.id)
            with pytest.raises(NotFound, match="no conversation"):
                judge(
                    session, viewer, NewJudgement("rating", False, conversation_id=conversation_id)
                )
            assert list_judgements(session, viewer) == ([], False)
            assert list_judgements(session, viewer, conversation_id=conversation_id)[0] == []
        assert session.get_one(Judgement, judgement.id).revision == 1
        for viewer in (ana, *([both] if elsewhere else [])):
            assert get_judgement(session, viewer, judgement.id).value is True
            assert not judge(session, viewer, about)[1]


def test_pages_run_from_the_newest_to_the_first(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        for number in range(5):
            ask(session, ana, f"Q{number}", answer_id=f"a{number}")
            rate(session, ana, True, f"a{number}")
        ids = session.scalars(select(Judgement.id).order_by(Judgement.id.desc())).all()
        first, more = list_judgements(session, ana, limit=3)
        rest, no_more = list_judgements(session, ana, after=first[-1].id, limit=3)
        assert [one.id for one in first + rest] == ids
        assert (more, no_more) == (True, False)
        assert list_judgements(session, ana, kind="stars") == ([], False)


def test_a_person_has_one_verdict_whatever_names_its_source(
    database: Database, ana: Viewer
) -> None:
    verdicts: list[tuple[str, Any, dict[str, Any]]] = [
        ("rating", True, {}),
        ("stars", 4, {}),
        ("correction", "Hello.", {}),
        ("comment", "Well.", {}),
        ("signal", 1, {"name": "copied"}),
    ]
    with database.write() as session:
        for kind, value, more in verdicts:
            for source in ("", "web", "app"):
                rate(session, ana, value, kind=kind, source_id=source, **more)
        changed, created = rate(session, ana, False, source_id="phone")
        assert (created, changed.value, changed.source_id, changed.revision) == (
            False, False, "phone", 2,
        )  # fmt: skip
        found, _ = list_judgements(session, ana, completion_id="a1")
        assert sorted(row.kind for row in found) == sorted(kind for kind, _, _ in verdicts)


@on_sqlite
def test_of_signals_sixteen_names_are_kept_of_each_person_and_choice(
    database: Database, ana: Viewer
) -> None:
    with database.write() as session:
        ask(session, ana, "Two", ["One", "Two"], answer_id="a2")
        for number in range(16):
            rate(session, ana, 1, "a2", kind="signal", name=f"n{number}")
        with pytest.raises(Conflict, match=r"'more' would be signal number 17 .*: n0, n1, n10,"):
            rate(session, ana, 1, "a2", kind="signal", name="more")
        with pytest.raises(Conflict):
            rate(session, ana, 1, "a2", kind="signal", name="more", source_type="code")
        assert rate(session, ana, 2, "a2", kind="signal", name="n3")[0].revision == 2
        assert rate(session, ana, 1, "a2", kind="signal", name="n3", source_type="code")[1]
        assert rate(session, ana, 1, "a2", kind="signal", name="more", choice_index=1)[1]
        ben = make_viewer(session, "root", sees_all=True)
        assert rate(session, ben, 1, "a2", kind="signal", name="more")[1]
