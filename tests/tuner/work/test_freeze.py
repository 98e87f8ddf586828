"""Freeze jobs: a data set is ready or it is not there."""

from __future__ import annotations

from typing import Any

import pytest

from feedback.curation.policy import Policy
from feedback.datasets import create_dataset
from feedback.datasets import freeze as freeze_dataset
from feedback.tables import Dataset, DatasetStatus, File
from tests.tuner.work.home import Home, take_over
from tuner.tuning import create_freeze_job


def test_a_freeze_whose_lease_is_lost_makes_nothing_ready(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with home.database.write() as session:
        dataset = create_dataset(session, "assistant", Policy(), created_by=None)
        job = create_freeze_job(session, dataset)

    def freeze_and_lose(*arguments: Any, **options: Any) -> Any:
        frozen = freeze_dataset(*arguments, **options)
        take_over(home, job)
        return frozen

    monkeypatch.setattr("tuner.work.freeze.freeze", freeze_and_lose)
    home.worker(poll_seconds=60.0, lease_seconds=600.0).run_one()
    with home.database.read() as session:
        assert session.get_one(Dataset, dataset.id).status == DatasetStatus.RUNNING
    assert home.count(File) == 0
