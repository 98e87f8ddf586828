"""Who leads, in which term, and what a leader that was overtaken can still write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from feedback.db import Database
from server.cluster import leader
from server.cluster.leader import CHANNEL, TRUST_SECONDS, Leader, NotLeading, leading
from server.tables import Control
from tests.postgres_sessions import end_session_of, shorten, until


class Clock:
    """Stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of all candidates of a test."""
    return Clock()


Start = Callable[..., Leader]


@pytest.fixture
def start(postgres_database: Database, clock: Clock) -> Iterator[Start]:
    """Makes a candidate of that id, which has not beaten yet."""
    with ExitStack() as stack:
        yield lambda gateway, **more: stack.enter_context(
            closing(Leader(postgres_database, gateway, clock=clock, **more))
        )


def control(database: Database) -> tuple[int, str]:
    """Term and leader, as the row says."""
    with database.read() as session:
        row = session.scalars(select(Control)).one()
        return row.term, row.leader


def version(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(Control.version)).one()


def leads(candidate: Leader) -> Callable[[], bool]:
    """Beats, and says whether it leads now."""

    def look() -> bool:
        candidate.beat()
        return candidate.is_leading()

    return look


def lock_of(candidate: Leader) -> Any:
    return candidate._lock


def test_one_of_two_leads_and_the_other_when_its_connection_breaks(
    postgres_database: Database, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    one, two = start("gw_1"), start("gw_2")
    for candidate in (one, two, one):
        candidate.beat()
    assert (one.is_leading(), two.is_leading()) == (True, False)
    assert control(postgres_database) == (1, "gw_1")
    with pytest.raises(NotLeading), two.writing():
        pass
    end_session_of(lock_of(one), postgres_database)
    two.beat()
    one.beat()
    assert (one.is_leading(), two.is_leading()) == (False, True)
    assert control(postgres_database) == (2, "gw_2")
    assert [(r.action, r.gateway, r.term) for r in caplog.records] == [
        ("leading", "gw_1", 1),
        ("leading", "gw_2", 2),
        ("lead_lost", "gw_1", 1),
    ]


def test_a_leader_whose_connection_breaks_leads_on_in_a_new_term(
    postgres_database: Database, start: Start
) -> None:
    one = start("gw_1")
    one.beat()
    end_session_of(lock_of(one), postgres_database)
    one.beat()
    assert one.is_leading()
    assert control(postgres_database) == (2, "gw_1")
    with one.writing():
        pass


def test_a_frozen_leader_is_overtaken_and_what_it_writes_afterwards_is_refused(
    postgres_database: Database, start: Start
) -> None:
    frozen, other = start("gw_frozen"), start("gw_other")
    frozen.beat()
    with lock_of(frozen).connection.begin():
        shorten("idle_session_timeout", lock_of(frozen).connection, 5)
    until(leads(other))
    assert frozen.is_leading()  # by its clock, which stood still too
    before = version(postgres_database)
    with pytest.raises(NotLeading, match="led in term 1, which has ended"), frozen.writing():
        pass
    assert version(postgres_database) == before
    with other.writing():
        pass
    assert version(postgres_database) == before + 1


def test_a_leader_that_freezes_while_it_writes_is_overtaken_and_commits_nothing(
    postgres_database: Database, start: Start
) -> None:
    frozen, other = start("gw_frozen"), start("gw_other")
    frozen.beat()

    def write_and_freeze() -> None:
        with frozen.writing() as session:
            end_session_of(lock_of(frozen), postgres_database)
            shorten("idle_in_transaction_session_timeout", session, 5)
            until(leads(other))

    with pytest.raises(DBAPIError):
        write_and_freeze()
    assert control(postgres_database) == (2, "gw_other")
    assert version(postgres_database) == 2  # of the two terms


def test_a_leader_without_a_recent_beat_does_not_trust_itself(
    postgres_database: Database, start: Start, clock: Clock
) -> None:
    one = start("gw_1")
    one.beat()
    clock.now += TRUST_SECONDS - 0.1
    assert one.is_leading()
    clock.now += 0.1
    assert not one.is_leading()
    with pytest.raises(NotLeading), one.writing():
        pass
    one.beat()  # it was late, and the lock is still there
    assert one.is_leading()
    assert control(postgres_database) == (1, "gw_1")


def test_a_lead_that_is_given_back_is_taken_at_the_next_beat(
    postgres_database: Database, start: Start
) -> None:
    stopping: list[bool] = []
    one, two = start("gw_1", is_wanted=lambda: not stopping), start("gw_2")
    one.beat()
    two.beat()
    stopping.append(True)
    assert not one.is_leading()
    one.beat()
    until(leads(two))
    one.beat()
    assert control(postgres_database) == (2, "gw_2")


def test_after_an_outage_somebody_leads_again(postgres_database: Database, start: Start) -> None:
    one = start("gw_1")
    one.beat()
    end_session_of(lock_of(one), postgres_database)
    event.listen(lock_of(one)._engine, "do_connect", _refuse)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            one.beat()
        assert not one.is_leading()
    event.remove(lock_of(one)._engine, "do_connect", _refuse)
    one.beat()
    assert one.is_leading()
    assert control(postgres_database) == (2, "gw_1")


def _refuse(*_: object) -> None:
    raise ConnectionError("away")


def test_a_lead_that_cannot_be_written_down_is_no_lead(
    postgres_database: Database, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start("gw_1"), start("gw_2")
    with monkeypatch.context() as patch:
        patch.setattr(leader, "_begin_term", _refuse)
        with pytest.raises(ConnectionError):
            one.beat()
    assert not one.is_leading()
    until(leads(two))


def test_listeners_hear_the_version_at_the_commit(
    postgres_database: Database, start: Start
) -> None:
    one = start("gw_1")
    one.beat()
    url = postgres_database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute(f"LISTEN {CHANNEL}")

        def write() -> None:
            with one.writing():
                assert list(listener.notifies(timeout=0)) == []

        write()
        heard = next(listener.notifies(timeout=30))
    assert heard.payload == str(version(postgres_database)) == "2"


def test_what_is_written_beside_a_fault_is_taken_back(
    postgres_database: Database, start: Start
) -> None:
    one = start("gw_1")
    one.beat()

    def write() -> Session:
        with one.writing():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert version(postgres_database) == 1


def test_on_sqlite_the_gateway_leads_whatever_its_clock_says(
    sqlite_database: Database, clock: Clock
) -> None:
    for term in (1, 2):
        with closing(Leader(sqlite_database, "gw_1", clock=clock)) as one:
            one.beat()
            clock.now += 1000
            with one.writing():
                pass
            assert one.is_leading()
            assert control(sqlite_database) == (term, "gw_1")
        assert not one.is_leading()


@pytest.mark.anyio
async def test_the_lead_is_there_from_the_first_moment_and_given_back_at_the_last(
    postgres_database: Database, start: Start
) -> None:
    one, two = start("gw_1"), start("gw_2")
    async with leading(one):
        assert one.is_leading()
        two.beat()
        assert not two.is_leading()
    assert not one.is_leading()
    await asyncio.to_thread(until, leads(two))
