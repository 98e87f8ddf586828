"""Promise 2: a judgement that was acknowledged stands once, whatever was sent again and killed."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text

from feedback.db import Database
from feedback.tables import Judgement, JudgementRevision
from tests.promise_fixtures import Figures
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import scaled
from tests.rows import add_answer

pytestmark = pytest.mark.promises

PEOPLE = ("ana", "ben", "cleo")
COPIES = 3
LATE = 2  #: the last copy of a verdict is sent after so many newer ones


class Address:
    """Where the gateway of the moment answers; nobody is asked while there is none."""

    def __init__(self) -> None:
        self._url: str | None = None
        self._acknowledged = 0
        self._changed = threading.Condition()

    def set(self, url: str | None) -> None:
        with self._changed:
            self._url = url
            self._changed.notify_all()

    def acknowledged(self) -> None:
        with self._changed:
            self._acknowledged += 1
            self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        """Block until so many more posts have been acknowledged."""
        with self._changed:
            goal = self._acknowledged + more
            assert self._changed.wait_for(lambda: self._acknowledged >= goal, 60)

    def wait(self) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: self._url is not None, 60)
            assert self._url is not None
            return self._url


class Rater:
    """Somebody who judges without pause, and sends each verdict three times under one id."""

    def __init__(self, user: str, key: str, answers: list[str], address: Address) -> None:
        self._user = user
        self._key = key
        self._answers = answers
        self._address = address
        self.said: list[dict[str, Any]] = []
        self.unanswered = 0

    def judge_until(self, stop: threading.Event) -> None:
        late: deque[dict[str, Any]] = deque()
        headers = {"authorization": f"Bearer {self._key}"}
        with httpx.Client(headers=headers, timeout=30, trust_env=False) as client:
            while not stop.is_set():
                verdict = self._verdict(len(self.said))
                self.said.append(verdict)
                self._send(client, verdict, COPIES - 1)
                late.append(verdict)
                if len(late) > LATE:
                    self._send(client, late.popleft(), 1)
            for verdict in late:
                self._send(client, verdict, 1)

    def _verdict(self, number: int) -> dict[str, Any]:
        """Each is another value than the one before it on the same answer and kind."""
        turn, place = divmod(number, 3 * len(self._answers))
        which, kind = divmod(place, 3)
        values = [
            ("rating", [True, False, None][turn % 3]),
            ("stars", 1 + turn % 5),
            ("correction", f"Better {number}"),
        ]
        name, value = values[kind]
        target = {"completion_id": self._answers[which], "kind": name}
        return {**target, "value": value, "id": f"{self._user}-{number}"}

    def _send(self, client: httpx.Client, verdict: dict[str, Any], copies: int) -> None:
        """So many times, and until it is acknowledged."""
        sent, acknowledged = 0, False
        while sent < copies or not acknowledged:
            url = self._address.wait()
            sent += 1
            try:
                reply = client.post(f"{url}/v1/feedback", json=verdict)
            except httpx.TransportError:
                self.unanswered += 1  # nobody knows whether it counted
                continue
            assert reply.status_code in (200, 201), reply.text
            acknowledged = True
            self._address.acknowledged()


def test_each_verdict_stands_once_with_its_whole_history_after_every_kill(
    tmp_path: Path, figures: Figures
) -> None:
    kills = scaled(100)
    place = prepare(tmp_path)
    base, settings, database = place.base, place.settings, place.database
    address, stop, chance = Address(), threading.Event(), random.Random(0)
    raters = []
    for user in PEOPLE:
        answers = [add_answer(database, user, prompt=f"Question {n}?") for n in range(3)]
        raters.append(Rater(user, place.key(user, "feedback"), answers, address))
    log = tmp_path / "gateway.log"
    with engine_process() as engine, ThreadPoolExecutor() as pool:
        judging = [pool.submit(rater.judge_until, stop) for rater in raters]
        try:
            for _ in range(kills):
                with gateway_process(settings.data, base.path, engine, log) as gateway:
                    address.set(gateway.url)
                    address.wait_for(20)
                    # The kill must strike at any moment of the verdicts under way.
                    time.sleep(chance.random() * 0.05)  # a kill at any moment
                    address.set(None)
                    gateway.kill()
                with database.read() as session:
                    assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        finally:
            stop.set()
            with gateway_process(settings.data, base.path, engine, log) as gateway:
                address.set(gateway.url)
                for done in judging:
                    done.result(60)
                assert gateway.terminate() == 0
    _check(database, raters)
    database.dispose()
    said = sum(len(rater.said) for rater in raters)
    unanswered = sum(rater.unanswered for rater in raters)
    assert said >= 5 * kills
    figures(kills=kills, verdicts=said, unanswered=unanswered, lost=0, doubled=0)


def _check(database: Database, raters: list[Rater]) -> None:
    expected: defaultdict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
    for rater in raters:
        for verdict in rater.said:
            place = verdict["completion_id"], verdict["kind"]
            expected[place].append((verdict["id"], verdict["value"]))
    with database.read() as session:
        rows = {row.id: row for row in session.scalars(select(Judgement))}
        history: defaultdict[tuple[str, str], list[tuple[str | None, Any]]] = defaultdict(list)
        said = select(JudgementRevision).order_by(JudgementRevision.revision)
        for one in session.scalars(said):
            row = rows[one.judgement_id]
            history[row.target_id, row.kind].append((one.client_id, _plain(one.value)))
    assert len(rows) == len(expected)  # one current row for each
    assert history == expected
    for row in rows.values():
        name, value = expected[row.target_id, row.kind][-1]
        assert (row.client_id, _plain(row.value)) == (name, value)


def _plain(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) else value
