"""Jobs of kind `freeze`: judged answers become a data set."""

from __future__ import annotations

from feedback.datasets import finish_freeze, freeze
from tuner import jobs
from tuner.work.lease import Lease
from tuner.work.workbench import Workbench


def freeze_dataset(bench: Workbench, lease: Lease) -> None:
    """Write the data set of the job, and finish the job with its counts."""
    dataset_id = str(lease.job.spec["dataset_id"])
    frozen = freeze(bench.database, dataset_id, data=bench.options.data, check=lease.check)
    with lease.ending() as session:
        dataset = finish_freeze(session, dataset_id, frozen)
        jobs.finish(
            session,
            lease.job,
            {
                "dataset_id": dataset.id,
                "counts": dataset.counts,
                "dropped": dataset.dropped,
                "content_hash": dataset.content_hash,
            },
        )
