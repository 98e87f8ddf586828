"""Promise 36: a clock that jumps ends or extends no lease, revives no key, reorders no generation.

A clock that jumped by some time, and rows that are all older or younger by that time, are the same
to whatever compares the two: so the rows of all tables are moved, and no clock is.
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from feedback.db import Base, Database, UtcDateTime
from server.errors import StillRunning
from server.http import idempotency
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tuner import jobs
from tuner.jobs import StalledJobs
from tuner.tables import Job, JobKind, JobStatus

pytestmark = pytest.mark.promises

#: Its times are what was signed; nothing compares them with the present.
UNMOVED = {"audit"}


class Clock:
    """An observer's own, which no jump moves."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def jump(database: Database, by: timedelta) -> int:
    """Have the wall clock jump: move all times that are stored the other way; how many."""
    moved = 0
    with database.write() as session:
        for table in Base.metadata.sorted_tables:
            times = [column for column in table.columns if isinstance(column.type, UtcDateTime)]
            if not times or table.name in UNMOVED:
                continue
            keys = list(table.primary_key.columns)
            for row in session.execute(select(*keys, *times)).all():
                key, at = row[: len(keys)], row[len(keys) :]
                there = {
                    column: value - by
                    for column, value in zip(times, at, strict=True)
                    if value is not None
                }
                same = [column == value for column, value in zip(keys, key, strict=True)]
                session.execute(table.update().where(*same).values(there))
                moved += len(there)
    return moved


@pytest.mark.parametrize("by", [timedelta(hours=-1), timedelta(days=1)], ids=["-1h", "+1d"])
def test_a_jump_of_the_clock_changes_no_lease_no_key_and_no_generation(
    running_gateway: RunningGateway, by: timedelta, figures: Figures
) -> None:
    database, clock = running_gateway.database, Clock()
    with database.write() as session:
        jobs.create_job(session, JobKind.FREEZE, spec={}, deployment="assistant")
        job = jobs.claim_job(session, "worker-1", kinds=[JobKind.FREEZE])
        assert job is not None
    observer = StalledJobs(lease_seconds=30, max_attempts=3, monotonic=clock)
    watch = idempotency.Watch(monotonic=clock)
    first, copy = (
        idempotency.build_attempt("key_1", "a-try", "POST", "/admin/keys", b"{}") for _ in range(2)
    )

    def stalled() -> list[str]:
        with database.read() as session:
            return [found.id for found in observer.find(session)]

    def taken_over() -> bool:
        try:
            with database.write() as session:
                return idempotency.begin(session, copy, watch=watch) is None
        except StillRunning:
            return False

    with database.write() as session:
        assert idempotency.begin(session, first, watch=watch) is None
    assert (stalled(), taken_over()) == ([], False)
    admin = running_gateway.client()
    kept, gone = (
        admin.post("/admin/keys", json={"user": user, "scopes": ["chat"]}).json()
        for user in ("anna", "bea")
    )
    admin.delete(f"/admin/keys/{gone['id']}")
    candidates = [running_gateway.candidate(seed).name for seed in (1, 2)]
    generations = [running_gateway.promote(candidates[0]).generation]

    moved = jump(database, by)
    running_gateway.refresh()

    # No lease has ended by it, and none lasts longer for it.
    assert (stalled(), taken_over()) == ([], False)
    clock.at += 29.9
    assert stalled() == []
    clock.at += 0.1
    assert stalled() == [job.id]
    clock.at += 29.9
    assert not taken_over()
    clock.at += 0.1
    assert taken_over()
    with database.write() as session:
        back = observer.take_back(session, session.get_one(Job, job.id))
        assert back is not None
        assert back.status == JobStatus.QUEUED
    # What was revoked stays so.
    statuses = [
        running_gateway.client(made["key"]).get("/v1/models").status_code for made in (kept, gone)
    ]
    assert statuses == [200, 401]
    # Moves go on where they were.
    generations.append(running_gateway.promote(candidates[1]).generation)
    generations.append(running_gateway.rollback().generation)
    assert generations == [1, 2, 3]
    assert admin.get("/admin/deployments/assistant").json()["production"] == candidates[0]
    entries = [entry["details"] for entry in admin.get("/admin/audit").json()["data"]]
    moves = [details["generation"] for details in entries if "generation" in details]
    assert moves == [3, 2, 1]
    assert admin.get("/admin/audit/verify").json()["whole"] is True
    figures(jump_hours=by.total_seconds() / 3600, times_moved=moved)
