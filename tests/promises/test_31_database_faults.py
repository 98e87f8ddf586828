"""Promise 31: a database that is locked, full or restarted under load costs no answer its record.

Callers ask without pause, plain and streamed, whole conversations, while the database behind a
gateway's process is taken away and given back. Covered: what each of them is told, that what they
saw the end of is in the record and nothing else is said to have been answered, that all goes on
without a restart. What is left out of the small run is the length of a fault: there the gateway
waits for a commit for half a second instead of five.
"""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, text

from feedback.db import Database
from feedback.tables import Answer, AnswerStatus, AnswerText
from server.settings import DatabaseSettings, GatewaySettings, ModelSettings, Settings
from tests.databases import serve_postgres, url_of
from tests.promise_fixtures import Figures
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import is_full, scaled
from tests.promises.traffic import CHAT, Refusal, Traffic
from tuner.base_models import BaseModel

pytestmark = pytest.mark.promises

FULL = is_full()
COMMIT_SECONDS = GatewaySettings().commit_timeout_seconds if FULL else 0.5
FAULT_SECONDS = 10.0 if FULL else 2.0
BACK_SECONDS = 10.0  #: longest wait for answers after the database is back
CALLERS = 6
TOKEN_SECONDS = 0.001  #: an answer of a caller takes 32
LONG_ANSWER = 1500  #: tokens: it begins before a fault and ends in it
DISK_MIB = 64

Fault = Callable[[], AbstractContextManager[None]]


def test_a_locked_sqlite_file_costs_no_answer_its_record(tmp_path: Path, figures: Figures) -> None:
    # Every second time the lock outlives SQLite's own patience, which is 10 s.
    locks = [FAULT_SECONDS + 2.0 * (turn % 2) for turn in range(scaled(20))]
    settings = _settings(tmp_path / "data", tmp_path)
    place = prepare(tmp_path, settings)
    base, database, key = place.base, place.database, place.key()

    @contextmanager
    def locked() -> Iterator[None]:
        with database.write() as session:
            session.connection()  # BEGIN IMMEDIATE
            yield

    traffic = _ask_through(settings, base, database, key, locks, locked)
    with database.read() as session:
        assert session.scalar(text("PRAGMA integrity_check")) == "ok"
    _check_record(database, traffic)
    figures(locks=len(locks), **_summary(traffic))


def test_a_full_disk_costs_no_answer_its_record(tmp_path: Path, figures: Figures) -> None:
    fills = [FAULT_SECONDS] * scaled(20)
    with _small_disk(tmp_path / "disk") as disk:
        settings = _settings(disk / "data", tmp_path)
        place = prepare(tmp_path, settings)
        base, database, key = place.base, place.database, place.key()

        @contextmanager
        def full() -> Iterator[None]:
            # With an empty log the next commit needs room, and does not find it in the log's file.
            connection = database.engine.raw_connection()
            (busy, *_) = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert busy == 0
            ballast = disk / "ballast"
            _fill(ballast)
            try:
                yield
            finally:
                ballast.unlink()
                connection.close()

        traffic = _ask_through(settings, base, database, key, fills, full)
        with database.read() as session:
            assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        _check_record(database, traffic)
    figures(full_disks=len(fills), **_summary(traffic))


def test_a_restart_of_postgresql_costs_no_answer_its_record(
    tmp_path: Path, figures: Figures
) -> None:
    restarts = [FAULT_SECONDS] * max(2, scaled(20))
    with serve_postgres() as server:  # the other tests need theirs
        url = url_of(server).render_as_string(hide_password=False)
        settings = _settings(tmp_path / "data", tmp_path, url=url)
        place = prepare(tmp_path, settings)
        base, database, key = place.base, place.database, place.key()
        modes = itertools.cycle(["fast", "immediate"])  # told to end, and as if it had crashed

        @contextmanager
        def down() -> Iterator[None]:
            command = [server.bin_path / "pg_ctl", "-w", "-D", server.pgdata, "-m", next(modes)]
            subprocess.run(
                [*command, "stop"],
                user=server.system_user,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            try:
                yield
            finally:
                server.ensure_postgres_running()

        traffic = _ask_through(settings, base, database, key, restarts, down)
        _check_record(database, traffic)
    figures(restarts=len(restarts), **_summary(traffic))


def _ask_through(
    settings: Settings,
    base: BaseModel,
    database: Database,
    key: str,
    seconds: Sequence[float],
    fault: Fault,
) -> Traffic:
    """Have one gateway asked all the time, through a fault of each of these lengths."""
    traffic = Traffic([], key, turns=3)
    variables = {"BURNISH_GATEWAY__COMMIT_TIMEOUT_SECONDS": str(COMMIT_SECONDS)}
    if settings.database.url is not None:
        variables["BURNISH_DATABASE__URL"] = settings.database.url
    log = settings.data / "gateway.log"  # where `burnish serve` has it, on the same disk
    with (
        engine_process() as engine,
        gateway_process(settings.data, base.path, engine, log, **variables) as gateway,
    ):
        httpx.post(f"{engine}/fake/faults", json={"token_seconds": TOKEN_SECONDS}, trust_env=False)
        traffic.urls = [gateway.url]
        with traffic.running(CALLERS):
            _wait_for_answers(traffic)
            for length in seconds:
                with _long_stream(gateway.url, key) as lines, fault():
                    _sit_out(traffic, lines, length)
                _wait_for_answers(traffic)
        _wait_until_none_is_started(database)
        assert gateway.terminate() == 0
    assert not (settings.data / "dead-letters.jsonl").exists()
    return traffic


def _sit_out(traffic: Traffic, lines: Iterator[str], seconds: float) -> None:
    """Wait until as many requests were refused as there are callers, and for so long at least.

    `lines` are the rest of an answer that began before the fault.
    """
    until = time.monotonic() + seconds
    goal = len(traffic.refusals) + CALLERS
    (*_, last) = lines
    assert last.startswith('data: {"error":')
    assert '"code":"not_recorded"' in last
    traffic.wait_until(lambda: len(traffic.refusals) >= goal)
    # How long the fault lasts is what is tried here.
    time.sleep(max(0.0, until - time.monotonic()))


def _wait_for_answers(traffic: Traffic) -> None:
    """Several for each caller: more than those that were under way already."""
    goal = len(traffic.answers) + 3 * CALLERS
    traffic.wait_until(lambda: len(traffic.answers) >= goal, BACK_SECONDS)


def _wait_until_none_is_started(database: Database) -> None:
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        with database.read() as session:
            started = select(func.count()).where(Answer.status == AnswerStatus.STARTED)
            left = session.scalar(started)
        if not left:
            return
        assert time.monotonic() < deadline, f"{left} answers are left started"
        time.sleep(0.05)  # another process writes: there is no event to wait for


def _check_record(database: Database, traffic: Traffic) -> None:
    assert len(traffic.errors) == len(traffic.refusals), traffic.errors  # nothing else went wrong
    kinds = _kinds(traffic)
    assert set(kinds) <= {
        (503, "not_recorded"),
        (503, "database_unavailable"),  # where something had to be read first
        (200, "not_recorded"),
    }
    assert kinds[503, "not_recorded"]
    assert {frozenset(refusal.error) for refusal in traffic.refusals} == {
        frozenset({"message", "type", "param", "code"})
    }
    with database.read() as session:
        complete = list(
            session.execute(
                select(Answer.id, AnswerText.messages, AnswerText.choices)
                .join(AnswerText)
                .where(Answer.status == AnswerStatus.COMPLETE)
            )
        )
    database.dispose()
    rows = {row.id: row for row in complete}
    heard = {answer.id: answer for answer in traffic.answers}
    assert len(heard) == len(traffic.answers)
    assert sorted(rows) == sorted(heard)  # none is missing, and none whose end nobody was sent
    asked = Counter(json.dumps(row.messages) for row in complete)
    assert set(asked.values()) == {1}
    for answer in traffic.answers:
        row = rows[answer.id]
        assert row.messages == answer.messages
        assert row.choices[0]["message"]["content"] == answer.content


def _kinds(traffic: Traffic) -> Counter[tuple[int, str | None]]:
    def kind(refusal: Refusal) -> tuple[int, str | None]:
        return refusal.status, refusal.error["code"]

    return Counter(map(kind, traffic.refusals))


def _summary(traffic: Traffic) -> dict[str, int | str]:
    refused = ", ".join(f"{n} × {status} {code}" for (status, code), n in _kinds(traffic).items())
    return {"answers": len(traffic.answers), "not_in_the_record": 0, "refused": refused}


@contextmanager
def _long_stream(url: str, key: str) -> Iterator[Iterator[str]]:
    """The lines that still come of an answer that has begun."""
    body = {
        "model": "assistant",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
        "max_tokens": LONG_ANSWER,
    }
    headers = {"authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as client,
        client.stream("POST", CHAT, json=body) as reply,
    ):
        assert reply.status_code == 200
        lines = (line for line in reply.iter_lines() if line)
        next(lines)
        yield lines


def _settings(data: Path, folder: Path, *, url: str | None = None) -> Settings:
    return Settings(
        data=data,
        model=ModelSettings(path=str(folder / "tiny")),
        database=DatabaseSettings(url=url),
    )


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder.mkdir()
    size = f"size={DISK_MIB}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        # Nothing else is full for SQLite as a disk is: limits of a process are another error.
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # A writer that is still there after a failure would keep the disk busy.
        subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024 * 1024))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
