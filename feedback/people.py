"""People, and on whose behalf a request looks at the record.

Owns: rows of `people`, and `Viewer`, the rule of who sees which answers. Does not own keys
(`server/access/keyring.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, select, true
from sqlalchemy.orm import Session

from feedback.db import insert_into, new_id, now
from feedback.tables import Answer, Person

ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Viewer:
    """On whose behalf the record is read or judged.

    A key of one person sees that person's answers; an application's key (`speaks_for_many`) those
    of all end users of its `user`; `sees_all` (the curator's and the administrator's view)
    everybody's. `deployments` limits all three.
    """

    user: str
    person_id: str
    key_id: str | None = None
    speaks_for_many: bool = False
    sees_all: bool = False
    deployments: tuple[str, ...] | None = None

    def sees(self) -> ColumnElement[bool]:
        """Condition on `answers` (needs no join)."""
        condition: ColumnElement[bool]
        if self.sees_all:
            condition = true()
        elif self.speaks_for_many:
            condition = Answer.person_id.in_(select(Person.id).where(Person.user == self.user))
        else:
            condition = Answer.person_id == self.person_id
        if self.deployments is not None:
            condition = condition & Answer.deployment.in_(self.deployments)
        return condition


def speaks_for(session: Session, viewer: Viewer, person_id: str) -> bool:
    """Whether this person is the viewer's own, or one of the end users of its application."""
    if person_id == viewer.person_id:
        return True
    if not viewer.speaks_for_many:
        return False
    person = session.get(Person, person_id)
    return person is not None and person.user == viewer.user


def speaker_of(session: Session, viewer: Viewer, owner_id: str) -> str:
    """The person for whom a verdict counts if it names nobody.

    That is the person who got the answer where the viewer speaks for them, as an application does
    for its end users; otherwise the viewer.
    """
    return owner_id if speaks_for(session, viewer, owner_id) else viewer.person_id


def find_person(session: Session, user: str, end_user: str = "") -> Person | None:
    """The person of that name, or None."""
    return session.scalar(select(Person).where(Person.user == user, Person.end_user == end_user))


def find_or_create_person(session: Session, user: str, end_user: str = "") -> Person:
    """The person of that name, made when it is their first appearance."""
    person = find_person(session, user, end_user)
    if person is not None:
        return person
    session.execute(
        insert_into(session, Person)
        .values(id=new_id("person_"), user=user, end_user=end_user, created_at=now())
        .on_conflict_do_nothing(index_elements=["user", "end_user"])
    )
    return session.scalars(
        select(Person).where(Person.user == user, Person.end_user == end_user)
    ).one()
