"""Evaluations: what is compared, and which rows of the holdout count."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.db import Database
from feedback.errors import BadRequest, Conflict, NotFound
from feedback.tables import DatasetStatus
from tests.tuner.records import (
    add_dataset,
    add_file,
    make_candidate,
    make_deployment,
    supervised,
)
from tuner.evaluation import evaluations
from tuner.evaluation.gate import Check, GateResult
from tuner.evaluation.holdout import Holdout
from tuner.jobs import create_job, request_cancel
from tuner.releases import discard, get_release
from tuner.tables import Decision, JobKind

HOLDOUT = [supervised(f"ex_h{number}", f"Held {number}?", "Good.") for number in range(4)]


def test_a_candidate_is_compared_with_production_on_its_data_sets_holdout(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        make_deployment(session, system_prompt="Be kind.")
        dataset = add_dataset(session, tmp_path, holdout=HOLDOUT)
        add_dataset(session, tmp_path, holdout=HOLDOUT[:1])
        release = make_candidate(session, dataset_id=dataset.id)
        evaluation, job = evaluations.create_evaluation(session, release, created_by="ann")
        assert (job.kind, job.spec) == (JobKind.EVALUATE, {"evaluation_id": evaluation.id})
        assert (evaluation.baseline, evaluation.dataset_id) == ("assistant@0", dataset.id)
    with database.read() as session:
        subject = evaluations.load_subject(session, evaluation.id)
        files = evaluations.find_holdout_files(session, evaluation.id, data=tmp_path)
    assert (subject.candidate.name, subject.baseline.name) == ("assistant@1", "assistant@0")
    holdout = Holdout(files)
    assert sorted(row["id"] for row in holdout) == [row["id"] for row in HOLDOUT]
    assert (subject.own_prompts, holdout.left_out) == ({"Be kind."}, 0)


def test_rows_that_either_release_learned_from_are_left_out(
    sqlite_database: Database, tmp_path: Path
) -> None:
    by_prompt = {**HOLDOUT[1], "id": "another", "prompt": [{"role": "user", "content": "HELD 1?"}]}
    openai = {"messages": [*HOLDOUT[2]["prompt"], {"role": "assistant", "content": "Other."}]}
    with sqlite_database.write() as session:
        make_deployment(session)
        validated = supervised("ex_v", "Valid?", "Yes.")
        dataset = add_dataset(session, tmp_path, holdout=[*HOLDOUT, validated])
        releases = []
        for seed, rows in enumerate(([HOLDOUT[0], by_prompt], [openai])):
            file = add_file(session, tmp_path, rows)
            held = add_file(session, tmp_path, [validated])  # it ended the run, so it chose too
            spec = {"files": [file.id], "validation_file": held.id}
            job = create_job(session, JobKind.TUNE, spec=spec)
            releases.append(
                make_candidate(session, seed=seed, job_id=job.id, dataset_id=dataset.id)
            )
        evaluation, _ = evaluations.create_evaluation(session, releases[1], releases[0])
        files = evaluations.find_holdout_files(session, evaluation.id, data=tmp_path)
    holdout = Holdout(files)
    assert [row["id"] for row in holdout] == ["ex_h3"]
    assert holdout.left_out == 4


def test_a_training_file_is_kept_for_an_evaluation_and_missed_afterwards(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        dataset = add_dataset(session, tmp_path, holdout=HOLDOUT)
        file = add_file(session, tmp_path, HOLDOUT[:1], side=None)
        job = create_job(session, JobKind.TUNE, spec={"files": [file.id]})
        release = make_candidate(session, job_id=job.id, dataset_id=dataset.id)
        assert evaluations.find_evaluation_on(session, file.id) is None
        evaluation, job = evaluations.create_evaluation(session, release)
        assert evaluations.find_evaluation_on(session, file.id) == job.id
        assert evaluations.load_subject(session, evaluation.id).candidate_deleted == ()
        request_cancel(session, job.id)
        assert evaluations.find_evaluation_on(session, file.id) is None
        session.delete(file)
        evaluation, _ = evaluations.create_evaluation(session, release)
        subject = evaluations.load_subject(session, evaluation.id)
        assert (subject.candidate_deleted, subject.baseline_deleted) == ((file.id,), ())


def test_a_release_without_a_data_set_is_compared_on_the_newest_one(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        release = make_candidate(session)
        evaluation, _ = evaluations.create_evaluation(session, release)
        assert evaluation.dataset_id is None
        files = evaluations.find_holdout_files(session, evaluation.id, data=tmp_path)
        assert len(Holdout(files)) == 0
        made = [add_dataset(session, tmp_path, holdout=HOLDOUT).id for _ in range(2)]
        add_dataset(session, tmp_path, status=DatasetStatus.RUNNING)
        evaluation, _ = evaluations.create_evaluation(session, release)
        assert evaluation.dataset_id == max(made)  # ids sort by time


def test_what_cannot_be_compared_is_refused(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        make_deployment(session, "second")
        release = make_candidate(session)
        with pytest.raises(BadRequest, match="compared with itself"):
            evaluations.create_evaluation(session, release, release)
        with pytest.raises(BadRequest, match="another deployment"):
            evaluations.create_evaluation(session, release, get_release(session, "second@0"))
        evaluation, _ = evaluations.create_evaluation(session, release)
        discard(session, release.name, reason="typo")
        with pytest.raises(Conflict, match=r"is discarded \(typo\)"):
            evaluations.create_evaluation(session, release)
        with pytest.raises(Conflict, match="is discarded"):
            evaluations.load_subject(session, evaluation.id)
        with pytest.raises(NotFound, match="eval_none"):
            evaluations.load_subject(session, "eval_none")


def test_a_verdict_is_stored_with_its_figures(database: Database) -> None:
    with database.write() as session:
        make_deployment(session)
        evaluation, _ = evaluations.create_evaluation(session, make_candidate(session))
        evaluation.error = "an earlier attempt"
        check = Check("holdout_nll", Decision.FAIL, "Worse.", 2.0, 1.0, 0.05)
        result = GateResult(Decision.FAIL, ("Worse.",), (check,))
        evaluations.record_result(session, evaluation.id, result, {"holdout_rows": 4})
    with database.read() as session:
        found = evaluations.get_evaluation(session, evaluation.id)
        assert (found.decision, found.reasons, found.error) == ("fail", ["Worse."], None)
        assert found.checks == [check.to_json()]
        assert found.metrics == {"holdout_rows": 4}
        assert found.finished_at is not None


def test_evaluations_are_listed_newest_first_in_pages(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        release = make_candidate(session)
        made = sorted(evaluations.create_evaluation(session, release)[0].id for _ in range(3))
        page, more = evaluations.list_evaluations(session, release=release.name, limit=2)
        assert ([row.id for row in page], more) == (made[:0:-1], True)
        rest, more = evaluations.list_evaluations(session, after=page[-1].id)
        assert ([row.id for row in rest], more) == (made[:1], False)
        assert evaluations.list_evaluations(session, deployments=["second"]) == ([], False)
