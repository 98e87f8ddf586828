"""Gateways that live, and gateways that no longer do, on one PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from feedback.db import Database, Driver
from feedback.recording import EndedAnswer, record_ended
from feedback.tables import Answer, AnswerStatus
from server.cluster import presence
from server.cluster.presence import GRACE_SECONDS, Presence, present
from tests.fake_engine import FakeEngine
from tests.feedback.record import ask, make_viewer
from tests.gateway_fixtures import start_gateway
from tests.postgres_sessions import end_session_of, until

LIVES_UNTIL_KILLED = """
import sys
from feedback.db import Database
from server.cluster.presence import Presence

presence = Presence(Database(sys.argv[1]), sys.argv[2])
presence.beat()
print("there", flush=True)
sys.stdin.read()
"""


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of all observers of a test."""
    return Clock()


Start = Callable[[str], Presence]


@pytest.fixture
def start(postgres_database: Database, clock: Clock) -> Iterator[Start]:
    """Makes the presence of a gateway of that id, which has not beaten yet."""
    with ExitStack() as stack:
        yield lambda gateway: stack.enter_context(
            closing(Presence(postgres_database, gateway, clock))
        )


def leave_started(database: Database, *gateways: str) -> None:
    """An answer of each of `gateways`, by its name, that has begun and not ended."""
    with database.write() as session:
        ana = make_viewer(session, "ana")
        for gateway in gateways:
            ask(session, ana, status=None, answer_id=f"of_{gateway}", gateway=gateway)


def error_codes(database: Database) -> dict[str, str | None]:
    """Why the answers of gateways were interrupted; None: they go on."""
    with database.read() as session:
        return {a.gateway: a.error_code for a in session.scalars(select(Answer))}


def is_free(database: Database, gateway: str) -> bool:
    with database.read() as session:
        return bool(session.scalar(presence._LOOK, presence._lock_of(gateway)))


def break_connection(database: Database, gateway: Presence) -> None:
    end_session_of(gateway._lock, database)


def one_after_the_other(
    first: Callable[[], None], then: Callable[..., None]
) -> Callable[..., None]:
    def both(*arguments: object) -> None:
        first()
        then(*arguments)

    return both


def test_answers_of_a_gateway_whose_lock_stays_free_are_ended_after_the_grace(
    postgres_database: Database, start: Start, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    leave_started(postgres_database, "gw_dead", "gw_lives", "gw_looks")
    dead, lives, looks = start("gw_dead"), start("gw_lives"), start("gw_looks")
    for gateway in (dead, lives, looks):
        gateway.beat()
    dead.close()
    until(lambda: is_free(postgres_database, "gw_dead"))
    looks.beat()
    clock.now += GRACE_SECONDS - 0.1
    looks.beat()
    assert error_codes(postgres_database)["gw_dead"] is None
    clock.now += 0.1
    looks.beat()
    looks.beat()
    assert error_codes(postgres_database) == {
        "gw_dead": "gateway_stopped",
        "gw_lives": None,
        "gw_looks": None,
    }
    assert [(r.levelno, r.action, r.gateway, r.answers) for r in caplog.records] == [
        (logging.WARNING, "leftovers_ended", "gw_dead", 1)
    ]


@pytest.mark.processes
def test_a_gateway_that_is_killed_is_dead_though_it_could_say_nothing(
    postgres_database: Database, start: Start, clock: Clock
) -> None:
    leave_started(postgres_database, "gw_killed")
    looks, url = start("gw_looks"), postgres_database.url.render_as_string(hide_password=False)
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", LIVES_UNTIL_KILLED, url, "gw_killed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "there\n"
            for _ in range(2):
                looks.beat()
                clock.now += GRACE_SECONDS
            assert error_codes(postgres_database) == {"gw_killed": None}
        finally:
            child.kill()
    until(lambda: is_free(postgres_database, "gw_killed"))
    for _ in range(2):
        looks.beat()
        clock.now += GRACE_SECONDS
    assert error_codes(postgres_database) == {"gw_killed": "gateway_stopped"}


def test_a_lock_that_was_lost_is_taken_again_and_the_grace_starts_anew(
    postgres_database: Database, start: Start, clock: Clock
) -> None:
    leave_started(postgres_database, "gw_flaps")
    flaps, looks = start("gw_flaps"), start("gw_looks")
    flaps.beat()
    break_connection(postgres_database, flaps)
    looks.beat()
    flaps.beat()
    assert not is_free(postgres_database, "gw_flaps")
    clock.now += GRACE_SECONDS
    looks.beat()
    break_connection(postgres_database, flaps)
    looks.beat()
    clock.now += GRACE_SECONDS - 1
    looks.beat()
    assert error_codes(postgres_database) == {"gw_flaps": None}
    clock.now += 1
    looks.beat()
    assert error_codes(postgres_database) == {"gw_flaps": "gateway_stopped"}


def test_a_lock_that_was_lost_in_the_middle_of_a_beat_is_taken_again_at_the_next(
    postgres_database: Database, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start("gw_1")
    gateway.beat()
    with monkeypatch.context() as patch:
        breaks = partial(break_connection, postgres_database, gateway)
        patch.setattr(gateway, "_find_dead", one_after_the_other(breaks, gateway._find_dead))
        with pytest.raises(OperationalError):
            gateway.beat()
    gateway.beat()
    assert not is_free(postgres_database, "gw_1")


def test_a_gateway_that_comes_back_at_the_last_moment_keeps_its_answers(
    postgres_database: Database, start: Start, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_started(postgres_database, "gw_late")
    late, looks = start("gw_late"), start("gw_looks")
    looks.beat()
    clock.now += GRACE_SECONDS
    monkeypatch.setattr(looks, "_end", one_after_the_other(late.beat, looks._end))
    looks.beat()
    assert error_codes(postgres_database) == {"gw_late": None}


def test_a_gateway_that_no_longer_beats_loses_its_lock_without_losing_its_connection(
    postgres_database: Database, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "IDLE_SECONDS", 0.5)
    frozen = start("gw_frozen")
    frozen.beat()
    until(lambda: is_free(postgres_database, "gw_frozen"))


def test_observers_that_look_at_once_are_not_taken_for_the_gateway_and_end_its_answers_once(
    postgres_database: Database, start: Start, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    leave_started(postgres_database, "gw_dead")
    one, two = start("gw_1"), start("gw_2")
    with postgres_database.read() as session:  # a third, in the middle of its look
        assert session.scalar(presence._LOOK, presence._lock_of("gw_dead"))
        one.beat()
        two.beat()
        clock.now += GRACE_SECONDS
        one.beat()
        assert error_codes(postgres_database) == {"gw_dead": None}  # not while somebody looks
    one.beat()
    two.beat()
    assert error_codes(postgres_database) == {"gw_dead": "gateway_stopped"}
    assert len(caplog.records) == 1


def test_the_observer_that_comes_second_finds_nothing_to_end(
    postgres_database: Database,
    start: Start,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    leave_started(postgres_database, "gw_dead")
    one, two = start("gw_1"), start("gw_2")
    one.beat()
    two.beat()
    clock.now += GRACE_SECONDS
    monkeypatch.setattr(one, "_end", one_after_the_other(two.beat, one._end))
    one.beat()
    assert error_codes(postgres_database) == {"gw_dead": "gateway_stopped"}
    assert len(caplog.records) == 1


def test_a_database_that_was_away_gives_everybody_the_whole_grace_again(
    postgres_database: Database, start: Start, clock: Clock
) -> None:
    leave_started(postgres_database, "gw_dead")
    looks = start("gw_looks")
    looks.beat()
    event.listen(looks._lock._engine, "before_cursor_execute", _refuse)
    clock.now += GRACE_SECONDS / 2
    with pytest.raises(ConnectionError):
        looks.beat()
    event.remove(looks._lock._engine, "before_cursor_execute", _refuse)
    clock.now += GRACE_SECONDS / 2
    looks.beat()
    assert error_codes(postgres_database) == {"gw_dead": None}
    clock.now += GRACE_SECONDS
    looks.beat()
    assert error_codes(postgres_database) == {"gw_dead": "gateway_stopped"}


def _refuse(*_: object) -> None:
    raise ConnectionError("away")


def test_an_answer_whose_end_is_being_written_is_left_to_its_gateway(
    postgres_database: Database, start: Start, clock: Clock
) -> None:
    leave_started(postgres_database, "gw_dead")
    looks = start("gw_looks")
    looks.beat()
    clock.now += GRACE_SECONDS
    with postgres_database.write() as session:
        record_ended(Driver.of(session), [EndedAnswer("of_gw_dead", AnswerStatus.COMPLETE, [])])
        looks.beat()  # waits for nobody
    assert error_codes(postgres_database) == {"gw_dead": None}


@pytest.mark.anyio
async def test_a_database_that_is_away_costs_beats_and_one_line_of_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.01)
    beats, enough, loop = [0], asyncio.Event(), asyncio.get_running_loop()
    beat = Presence.beat

    def counted(self: Presence) -> None:
        beats[0] += 1
        if beats[0] == 4:
            loop.call_soon_threadsafe(enough.set)
        beat(self)

    monkeypatch.setattr(Presence, "beat", counted)
    nowhere = Database("postgresql://nobody@127.0.0.1:1/nowhere")
    async with present(nowhere, "gw_1"), asyncio.timeout(30):
        await enough.wait()
    assert [record.action for record in caplog.records] == ["presence_failed"]


@pytest.mark.anyio
async def test_whoever_is_present_is_seen_from_the_first_moment_to_the_last(
    postgres_database: Database,
) -> None:
    async with present(postgres_database, "gw_1"):
        assert not is_free(postgres_database, "gw_1")
    until(lambda: is_free(postgres_database, "gw_1"))


@pytest.mark.anyio
async def test_on_sqlite_nobody_looks_at_anybody(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "Presence", None)  # to make one would raise
    before = asyncio.all_tasks()
    async with present(sqlite_database, "gw_1"):
        assert asyncio.all_tasks() == before


def test_a_running_gateway_ends_the_answers_of_one_that_is_dead(
    postgres_database: Database,
    gateway_engine: FakeEngine,
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(presence, "GRACE_SECONDS", 0.0)
    start("gw_lives").beat()
    with start_gateway(postgres_database, tmp_path / "data", [gateway_engine.address]) as running:
        own = running.gateway.id
        leave_started(postgres_database, "gw_dead", "gw_lives", own)
        until(lambda: error_codes(postgres_database)["gw_dead"] is not None)
        assert error_codes(postgres_database) == {
            "gw_dead": "gateway_stopped",
            "gw_lives": None,
            own: None,
        }
