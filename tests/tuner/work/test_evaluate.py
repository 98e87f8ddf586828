"""Evaluation jobs: what one says that could not be measured."""

from __future__ import annotations

import threading

import httpx
import pytest

from tests.tuner.work.home import Home
from tuner.tables import Evaluation, JobStatus


@pytest.mark.parametrize("path", ["/internal/evaluation-slot", "/internal/score"])
def test_a_stopping_worker_gives_its_evaluation_back_while_the_gateway_is_silent(
    home: Home, path: str
) -> None:
    evaluation, job = home.evaluate()
    home.gateway.silent = path
    home.gateway.may_reply.clear()
    thread = threading.Thread(target=home.worker().run)
    thread.start()
    assert home.gateway.asked.wait(20)
    home.stopping.set()
    thread.join(20)
    home.gateway.may_reply.set()
    assert not thread.is_alive()
    assert home.job(job).status == JobStatus.QUEUED
    home.stopping.clear()
    assert home.worker().run_one()
    with home.database.read() as session:
        assert session.get_one(Evaluation, evaluation.id).decision == "pass"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/internal/evaluation-slot", 404, "not_found"),
        ("/internal/score", 502, "gateway_refused"),
        ("/internal/score", 503, "gateway_unreachable"),
    ],
)
def test_an_evaluation_that_the_gateway_refuses_says_so(
    home: Home, path: str, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation, job = home.evaluate()
    error = {"message": "a zyzzyva", "code": "not_found" if status == 404 else None}
    home.gateway.failing[path] = httpx.Response(
        status, json={"error": error}, headers={"retry-after": "30"}
    )
    with caplog.at_level("INFO"):
        home.worker().run_one()
    assert home.job(job).error_code == code
    assert "Job ended" in caplog.text
    assert "zyzzyva" in str(home.job(job).error_message)
    assert "zyzzyva" not in caplog.text  # an engine's words may repeat a prompt
    with home.database.read() as session:
        found = session.get_one(Evaluation, evaluation.id)
        assert (found.decision, found.error) == (None, home.job(job).error_message)


def test_an_evaluation_without_its_holdouts_file_says_so(home: Home) -> None:
    _, job = home.evaluate()
    for file in (home.data / "files").iterdir():
        file.unlink()
    home.worker().run_one()
    assert home.job(job).error_code == "holdout_missing"
