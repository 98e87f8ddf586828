"""Comparisons: one pair is one row, whichever way round it is told."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from feedback.comparisons import (
    NewComparison,
    compare,
    get_comparison,
    list_comparison_revisions,
    list_comparisons,
    withdraw_comparison,
)
from feedback.db import Database
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.people import Viewer
from feedback.tables import Answer, AnswerKind, AnswerStatus, ComparisonRevision
from tests.feedback.record import ask, make_viewer

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def ana(database: Database) -> Viewer:
    """Somebody who got a1 and a2 to the same question."""
    with database.write() as session:
        viewer = make_viewer(session, "ana")
        for name in ("a1", "a2"):
            ask(session, viewer, "Hi", f"Hello {name}", answer_id=name)
    return viewer


def test_a_pair_that_arrives_three_times_is_one(database: Database, ana: Viewer) -> None:
    said = NewComparison(("a2", "a1"), "a", client_id="c1")
    for created in (True, False, False):
        with database.write() as session:
            comparison, new = compare(session, ana, said)
            assert new is created
    assert (comparison.answer_a, comparison.answer_b, comparison.preferred) == ("a1", "a2", "b")
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(ComparisonRevision)) == 1
        assert session.scalars(select(Answer.revision)).all() == [1, 1]


@on_sqlite
def test_the_pair_exchanged_is_the_same_pair(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        first, _ = compare(session, ana, NewComparison(("a1", "a2"), "a"))
        again, created = compare(session, ana, NewComparison(("a2", "a1"), "b"))
        assert (again.id, again.revision, created) == (first.id, 1, False)
        for word in ("tie", "both_bad"):
            changed, _ = compare(session, ana, NewComparison(("a2", "a1"), word))
            assert changed.preferred == word


def test_of_an_applications_two_users_it_counts_for_one_whichever_way_round(
    sqlite_database: Database,
) -> None:
    with sqlite_database.write() as session:
        app = make_viewer(session, "app", speaks_for_many=True)
        for user in ("u1", "u2"):
            ask(session, make_viewer(session, "app", user), "Hi", user, answer_id=f"a-{user}")
        compare(session, app, NewComparison(("a-u1", "a-u2"), "a"))
        again, created = compare(session, app, NewComparison(("a-u2", "a-u1"), "b"))
        assert not created
        assert again.person_id == make_viewer(session, "app", "u1").person_id


def test_history_and_withdrawal(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        for preferred in ("a", "b"):
            comparison, _ = compare(session, ana, NewComparison(("a1", "a2"), preferred))
        withdraw_comparison(session, ana, comparison.id)
        withdraw_comparison(session, ana, comparison.id)
        said = list_comparison_revisions(session, ana, comparison.id)
        assert [one.preferred for one in said] == ["a", "b", None]
        assert list_comparisons(session, ana) == ([], False)
        assert get_comparison(session, ana, comparison.id).preferred is None
        back, created = compare(session, ana, NewComparison(("a1", "a2"), "a"))
        assert (back.id, created) == (comparison.id, False)


@on_sqlite
def test_a_late_copy_does_not_undo_a_newer_verdict(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        compare(session, ana, NewComparison(("a1", "a2"), "a", client_id="c1"))
        compare(session, ana, NewComparison(("a1", "a2"), "b", client_id="c2"))
        late, _ = compare(session, ana, NewComparison(("a1", "a2"), "a", client_id="c1"))
        assert late.preferred == "b"


@on_sqlite
def test_an_id_used_for_another_pair_is_a_conflict(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        ask(session, ana, "Hi", "A third", answer_id="a3")
        compare(session, ana, NewComparison(("a1", "a2"), "a", client_id="c1"))
        with pytest.raises(Conflict, match="'c1' was used"):
            compare(session, ana, NewComparison(("a1", "a3"), "a", client_id="c1"))


@on_sqlite
def test_two_choices_of_one_answer_can_be_compared(database: Database, ana: Viewer) -> None:
    with database.write() as session:
        ask(session, ana, "Two", ["One", "Two"], answer_id="a3")
        said = NewComparison(("a3", "a3"), "a", choice_indexes=(1, 0))
        comparison, _ = compare(session, ana, said)
        assert (comparison.choice_a, comparison.choice_b, comparison.preferred) == (0, 1, "b")


@pytest.mark.parametrize(
    ("other", "error", "says"),
    [
        ({"question": "Bye"}, BadRequest, "different messages"),
        ({"tools": [{"type": "function"}]}, BadRequest, "different messages"),
        ({"status": AnswerStatus.INTERRUPTED}, BadRequest, "is interrupted"),
        ({"status": None}, BadRequest, "is started"),
        ({"stored": False}, BadRequest, "was not stored"),
        ({"kind": AnswerKind.TASK}, BadRequest, "not a chat completion"),
        ({"answer_id": "a9"}, NotFound, "'a2'"),
        ({"viewer": "ben"}, NotFound, "'a2'"),
    ],
)
def test_answers_that_cannot_be_compared(
    sqlite_database: Database, other: dict[str, Any], error: type[Exception], says: str
) -> None:
    fields = {"question": "Hi", "answer_id": "a2", **other}
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, "Hi", answer_id="a1")
        ask(session, make_viewer(session, fields.pop("viewer", "ana")), **fields)
        with pytest.raises(error, match=says):
            compare(session, ana, NewComparison(("a1", "a2"), "a"))


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (NewComparison(("a1", "a1"), "a"), "with itself"),
        (NewComparison(("a1", "a2"), "c"), "'both_bad'"),
        (NewComparison(("a1", "a2"), "a", choice_indexes=(0, 1)), "no choice 1"),
    ],
)
def test_comparisons_that_say_nothing(
    sqlite_database: Database, new: NewComparison, says: str
) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        for name in ("a1", "a2"):
            ask(session, ana, answer_id=name)
        with pytest.raises(BadRequest, match=says):
            compare(session, ana, new)
        with pytest.raises(NotFound, match="to withdraw"):
            compare(session, ana, NewComparison(("a1", "a2"), None))


def test_system_prompts_of_two_releases_do_not_make_two_prompts(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        ask(session, ana, "Hi", "One", system="Be brief.", answer_id="a1")
        ask(session, ana, "Hi", "Two", system="Be kind.", answer_id="a2")
        assert compare(session, ana, NewComparison(("a1", "a2"), "a"))[1]


def test_each_kind_of_viewer_sees_its_own_only(database: Database) -> None:
    with database.write() as session:
        ana, u1 = make_viewer(session, "ana"), make_viewer(session, "app", "u1")
        app = make_viewer(session, "app", speaks_for_many=True)
        root = make_viewer(session, "root", sees_all=True)
        poet = make_viewer(session, "root", sees_all=True, deployments=("poet",))
        for viewer, pair, deployments in (
            (ana, ("a1", "a2"), ("assistant", "assistant")),
            (u1, ("v1", "v2"), ("poet", "poet")),
            (u1, ("w1", "w2"), ("poet", "assistant")),
        ):
            for name, deployment in zip(pair, deployments, strict=True):
                ask(session, viewer, pair[0], name, answer_id=name, deployment=deployment)
            compare(session, viewer, NewComparison(pair, "a"))

        def seen(viewer: Viewer) -> list[str]:
            rows, _ = list_comparisons(session, viewer)
            return sorted(row.answer_a for row in rows)

        assert seen(ana) == ["a1"]
        assert seen(u1) == seen(app) == ["v1", "w1"]
        assert seen(root) == ["a1", "v1", "w1"]
        assert seen(poet) == ["v1"]
        assert [row.answer_a for row in list_comparisons(session, u1, completion_id="w2")[0]] == [
            "w1"
        ]
        mine = list_comparisons(session, ana)[0][0].id
        for stranger in (u1, app, poet):
            for call in (get_comparison, withdraw_comparison, list_comparison_revisions):
                with pytest.raises(NotFound):
                    call(session, stranger, mine)


def test_a_person_has_one_comparison_of_a_pair_whatever_names_its_source(
    database: Database, ana: Viewer
) -> None:
    with database.write() as session:
        first, _ = compare(session, ana, NewComparison(("a1", "a2"), "a"))
        for source in ("web", "app"):
            again, created = compare(
                session, ana, NewComparison(("a2", "a1"), "a", source_id=source)
            )
            assert (again.id, created) == (first.id, False)
        assert (again.preferred, again.revision, again.source_id) == ("b", 2, "web")
        for source in ("m1", "m2"):
            judged = NewComparison(("a1", "a2"), "a", source_type="judge", source_id=source)
            assert compare(session, ana, judged)[1]
