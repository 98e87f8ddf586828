"""Jobs of kind `evaluate`: a candidate is compared with its baseline, and the gate decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from tuner import jobs
from tuner.evaluation.evaluations import find_holdout_files, load_subject, record_result
from tuner.evaluation.holdout import Holdout
from tuner.evaluation.measurement import run_evaluation
from tuner.job_events import NewEvent
from tuner.jobs import JobFailed
from tuner.work.journal import Journal, Progress
from tuner.work.lease import Lease
from tuner.work.workbench import Workbench

GENERAL_FOLDER: Final = "general"  #: of the data directory: what the base answered, once


def evaluate_release(bench: Workbench, lease: Lease) -> None:
    """Measure both releases on the holdout, and store what the gate decided."""
    evaluation_id = str(lease.job.spec["evaluation_id"])
    with bench.database.read() as session:
        subject = load_subject(session, evaluation_id)
        files = find_holdout_files(session, evaluation_id, data=bench.options.data)
    try:
        rows = Holdout(files, check=lease.check)
    except FileNotFoundError as error:
        raise JobFailed(
            "holdout_missing",
            f"{Path(str(error.filename)).name!r} of the data set is not on disk; restore it, "
            "or make a new data set.",
        ) from None
    subject = replace(subject, rows=rows, left_out=rows.left_out)
    journal = Journal(bench.database, lease.job)
    progress = Progress(journal, lease.check, bench.monotonic)
    result, metrics = run_evaluation(
        bench.client, subject, report=progress.report, folder=bench.options.data / GENERAL_FOLDER
    )
    reasons = list(result.reasons)
    with lease.ending() as session:
        journal.flush(session)
        record_result(session, evaluation_id, result, metrics)
        told = NewEvent(
            f"{subject.candidate.name!r} against {subject.baseline.name!r}: "
            f"{result.decision}. {' '.join(reasons)}",
            data={"decision": str(result.decision), "reasons": reasons},
        )
        jobs.record_events(session, lease.job, [told])
        jobs.finish(
            session,
            lease.job,
            {
                "evaluation_id": evaluation_id,
                "decision": str(result.decision),
                "reasons": reasons,
                "metrics": metrics,
            },
        )
