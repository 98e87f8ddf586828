"""People, and which answers each kind of viewer sees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from feedback.db import Database
from feedback.people import find_or_create_person, find_person
from feedback.tables import Answer, Person
from tests.feedback.record import ask, make_viewer


def test_a_name_is_one_person_however_many_ask_at_once(database: Database) -> None:
    def find(_: int) -> str:
        with database.write() as session:
            return find_or_create_person(session, "app", "u1").id

    with ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(find, range(8)))
    with database.read() as session:
        assert ids == set(session.scalars(select(Person.id)))
        assert len(ids) == 1


def test_an_end_user_is_not_the_user_of_that_name(database: Database) -> None:
    with database.write() as session:
        one = find_or_create_person(session, "app", "ana")
        other = find_or_create_person(session, "ana")
        assert one.id != other.id
        assert find_person(session, "app") is None


@pytest.mark.parametrize(
    ("user", "end_user", "rights", "seen"),
    [
        ("ana", "", {}, {"ana"}),
        ("app", "u1", {}, {"u1"}),
        ("app", "", {"speaks_for_many": True}, {"u1", "u2", "other-model"}),
        ("root", "", {"sees_all": True}, {"ana", "u1", "u2", "other-model"}),
        ("root", "", {"sees_all": True, "deployments": ("poet",)}, {"other-model"}),
        ("app", "", {"speaks_for_many": True, "deployments": ()}, set()),
    ],
)
def test_each_kind_of_viewer_sees_its_own_answers_only(
    sqlite_database: Database, user: str, end_user: str, rights: dict[str, object], seen: set[str]
) -> None:
    with sqlite_database.write() as session:
        ask(session, make_viewer(session, "ana"), answer_id="ana")
        ask(session, make_viewer(session, "app", "u1"), answer_id="u1")
        ask(session, make_viewer(session, "app", "u2"), answer_id="u2")
        ask(
            session,
            make_viewer(session, "app", "u2"),
            answer_id="other-model",
            deployment="poet",
        )
        viewer = make_viewer(session, user, end_user, **rights)
        assert set(session.scalars(select(Answer.id).where(viewer.sees()))) == seen
