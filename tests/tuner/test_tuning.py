"""Tuning jobs as they are asked for: what is trained on, and every refusal in a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from feedback.db import Database
from feedback.errors import AppError, BadRequest
from feedback.tables import Dataset, DatasetRow, DatasetStatus, File
from tests.tuner.records import (
    add_dataset,
    add_file,
    make_candidate,
    make_deployment,
    preference,
    supervised,
)
from tuner import jobs, tuning
from tuner.deployments import get_deployment
from tuner.job_events import list_events
from tuner.methods import HYPERPARAMETERS, Choice, Method
from tuner.moves import move_production
from tuner.tables import Job, JobEvent, JobKind
from tuner.tuning import check_hyperparameters, create_tuning_job

ROWS = [
    supervised("ex_1", "One?", "First."),
    supervised("ex_2", "Two?", "Second."),
    preference("ex_3", "Three?", "Yes.", "No."),
]
RATED = [
    {**supervised("ex_4", "Four?", "Yes."), "kind": "labelled", "label": True},
    {**supervised("ex_5", "Five?", "No."), "kind": "labelled", "label": False},
]


def kinds_of(session: Any, files: list[str]) -> list[str | None]:
    return [session.get_one(File, file).kind for file in files]


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("supervised", ["supervised"]),
        ("dpo", ["preference", "supervised"]),
        ("kto", ["labelled"]),
        ("combined", ["preference", "supervised", "labelled"]),
    ],
)
def test_a_job_on_a_data_set_trains_on_all_that_its_method_learns_from(
    database: Database, tmp_path: Path, method: str, kinds: list[str]
) -> None:
    with database.write() as session:
        deployment = make_deployment(session)
        dataset = add_dataset(session, tmp_path, train=[*ROWS, *RATED], holdout=ROWS[:1])
        job = create_tuning_job(
            session,
            deployment,
            method=method,
            training_file=dataset.id,
            hyperparameters={"n_epochs": 2, "beta": "auto", "labelled_loss": "auto", "r": None},
            seed=7,
            created_by="ann",
        )
        assert (job.kind, job.method, job.deployment) == (JobKind.TUNE, method, "assistant")
        files = job.spec.pop("files")
        assert job.spec == {
            "training_file": dataset.id,
            "dataset_id": dataset.id,
            "validation_file": None,
            "hyperparameters": {"n_epochs": 2},
            "suffix": None,
            "seed": 7,
            "sources_left_out": [],
        }
        assert kinds_of(session, files) == kinds


def test_a_job_on_an_upload_names_what_production_learned_from(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        dataset = add_dataset(session, tmp_path, train=ROWS)
        make_candidate(session, dataset_id=dataset.id)
        deployment = move_production(session, "assistant", 1, expected_generation=0)
        upload = add_file(session, tmp_path, ROWS, kind=None, side=None, dialect="openai")
        ask = {"method": "supervised", "hyperparameters": {}}
        job = create_tuning_job(session, deployment, training_file=upload.id, **ask)
        assert job.spec["files"] == [upload.id]
        assert (job.spec["dataset_id"], job.spec["sources_left_out"]) == (None, [dataset.id])
        job = create_tuning_job(session, deployment, training_file=dataset.id, **ask)
        assert job.spec["sources_left_out"] == []


def test_an_upload_that_production_learned_from_is_named_where_it_is_left_out(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        dataset = add_dataset(session, tmp_path, train=ROWS)
        learned, other = (add_file(session, tmp_path, ROWS, side=None) for _ in range(2))
        ask = {"method": "supervised", "hyperparameters": {}}
        job = create_tuning_job(session, deployment, training_file=learned.id, **ask)
        make_candidate(session, job_id=job.id)
        deployment = move_production(session, "assistant", 1, expected_generation=0)
        left_out = {
            file: create_tuning_job(session, deployment, training_file=file, **ask).spec[
                "sources_left_out"
            ]
            for file in (learned.id, other.id, dataset.id)
        }
        assert left_out == {learned.id: [], other.id: [learned.id], dataset.id: [learned.id]}


def test_a_file_is_in_use_until_its_last_job_has_ended(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        deployment = make_deployment(session)
        file = add_file(session, tmp_path, ROWS, side=None)
        assert tuning.find_job_on(session, file.id) is None
        job = create_tuning_job(session, deployment, method="supervised", training_file=file.id)
        assert tuning.find_job_on(session, file.id) == job.id
        jobs.request_pause(session, job.id)
        assert tuning.find_job_on(session, file.id) == job.id
        jobs.request_cancel(session, job.id)
        assert tuning.find_job_on(session, file.id) is None


def test_a_job_needs_its_validation_file_too(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        deployment = make_deployment(session)
        dataset = add_dataset(session, tmp_path, train=ROWS)
        pairs, held = (
            add_file(session, tmp_path, rows, kind=rows[0]["kind"], side=None)
            for rows in ([preference("p", "Four?", "Yes.", "No.")], [supervised("s", "5?", "No.")])
        )
        for validation in (pairs, held):
            job = create_tuning_job(
                session,
                deployment,
                method="dpo",
                training_file=dataset.id,
                validation_file=validation.id,
                suffix="s" * 64,
            )
            assert job.spec["validation_file"] == validation.id
            assert validation.id not in job.spec["files"]
            assert job.spec["suffix"] == "s" * 64
            assert tuning.find_job_on(session, validation.id) == job.id


REFUSALS: list[tuple[str, dict[str, Any], str | None, str]] = [
    (
        "method",
        {"method": "ppo"},
        None,
        "Found method 'ppo', expected 'supervised', 'dpo', 'kto' or 'combined'.",
    ),
    ("no data set", {"training_file": "ds_none"}, "not_found", "No data set 'ds_none'."),
    ("no file", {"training_file": "file-none"}, "not_found", "No file 'file-none'."),
    ("unfinished", {"training_file": "unfinished"}, "dataset_not_ready", "is running, expected"),
    ("another's set", {"training_file": "second"}, None, "made from the answers of 'second'"),
    ("another's file", {"training_file": "second file"}, None, "from the answers of 'second'"),
    (
        "no pairs",
        {"training_file": "only corrections", "method": "dpo"},
        "nothing_to_learn",
        "has 0 preference examples to train on, method 'dpo' needs at least 1. It has 2 supervised "
        "ones to train on and 0 held out. Add comparisons, or corrections that change much of an "
        "answer, or use method 'supervised'.",
    ),
    (
        "no corrections",
        {"training_file": "only pairs"},
        "nothing_to_learn",
        "has 0 supervised examples to train on, method 'supervised' needs at least 1. It has 1 "
        "preference ones to train on and 0 held out. Add corrections (kind 'correction'), or use "
        "method 'dpo'.",
    ),
    (
        "only ratings",
        {"training_file": "only ratings"},
        "nothing_to_learn",
        "needs at least 1. It has 2 labelled ones to train on and 0 held out. Add corrections "
        "(kind 'correction'), or use method 'kto'.",
    ),
    (
        "no ratings",
        {"training_file": "only corrections", "method": "kto"},
        "nothing_to_learn",
        "has 0 labelled examples to train on, method 'kto' needs at least 1. It has 2 supervised "
        "ones to train on and 0 held out. Add ratings or stars, or use method 'supervised'.",
    ),
    (
        "nothing at all",
        {"training_file": "none", "method": "combined"},
        "nothing_to_learn",
        "has 0 preference or supervised or labelled examples to train on, method 'combined' needs",
    ),
    ("holdout", {"training_file": "holdout"}, None, "is the holdout of ds_"),
    ("empty", {"training_file": "empty"}, "nothing_to_learn", "has 0 examples; add corrections"),
    (
        "kind",
        {"training_file": "pairs file"},
        None,
        "has preference examples, method 'supervised' needs supervised ones; use method 'dpo'.",
    ),
    (
        "unknown hyperparameter",
        {"hyperparameters": {"lr": 1}},
        None,
        "Unknown hyperparameter 'lr'; expected one of n_epochs, batch_size",
    ),
    (
        "another method's hyperparameter",
        {"hyperparameters": {"beta": 0.2}},
        None,
        "Hyperparameter 'beta' (how closely DPO and KTO are held to the base) changes nothing in "
        "method 'supervised'; leave it out, or use method 'dpo', 'kto' or 'combined'.",
    ),
    (
        "a hyperparameter of combined",
        {"hyperparameters": {"labelled_weight": 2.0}},
        None,
        "changes nothing in method 'supervised'; leave it out, or use method 'combined'.",
    ),
    (
        "both rates",
        {"hyperparameters": {"learning_rate": 1e-4, "learning_rate_multiplier": 2}},
        None,
        "both learning_rate and learning_rate_multiplier",
    ),
    (
        "rank",
        {"hyperparameters": {"r": 32}, "max_rank": 16},
        None,
        "Hyperparameter 'r' is 32, but the engines serve ranks up to 16",
    ),
    ("empty suffix", {"suffix": ""}, None, "suffix is ''; expected 1 to 64 printable characters."),
    ("long suffix", {"suffix": "s" * 65}, None, "expected 1 to 64 printable characters."),
    ("two lines", {"suffix": "a\nb"}, None, r"suffix is 'a\nb'; expected 1 to 64 printable"),
    ("no validation", {"validation_file": "file-none"}, "not_found", "No file 'file-none'."),
    ("validation set", {"validation_file": "good"}, None, "takes one file (file-…)"),
    (
        "another's validation",
        {"validation_file": "second file"},
        None,
        "from the answers of 'second'",
    ),
    (
        "validation holdout",
        {"validation_file": "holdout"},
        None,
        "which is kept for evaluations: a run that it ended would be measured by what chose it.",
    ),
    ("validation empty", {"validation_file": "empty"}, None, "has 0 examples; without"),
    (
        "validation kind",
        {"validation_file": "pairs file"},
        None,
        "has preference examples, method 'supervised' reads supervised ones.",
    ),
    (
        "validation is trained on",
        {"validation_file": "good file"},
        None,
        "which is trained on; rows that validate never train, so give others.",
    ),
    (
        "validation has the same rows",
        {"validation_file": "copy"},
        None,
        "which is trained on; rows that validate never train, so give others.",
    ),
]


@pytest.mark.parametrize(
    ("changed", "code", "said"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_a_refusal_says_what_to_do(
    sqlite_database: Database, tmp_path: Path, changed: dict[str, Any], code: str | None, said: str
) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        make_deployment(session, "second")
        good = add_dataset(session, tmp_path, train=ROWS, holdout=ROWS[:1])
        second = add_dataset(session, tmp_path, train=ROWS, deployment="second")

        def part(dataset_id: str, kind: str, side: str = "train") -> str:
            found = session.query(File).filter_by(dataset_id=dataset_id, kind=kind, side=side)
            return found.one().id

        unfinished = add_dataset(session, tmp_path, train=ROWS, status=DatasetStatus.RUNNING)
        known = {
            "good": good.id,
            "second": second.id,
            "second file": part(second.id, "supervised"),
            "good file": part(good.id, "supervised"),
            "copy": add_file(session, tmp_path, ROWS[:2], side=None).id,
            "unfinished": unfinished.id,
            "only corrections": add_dataset(session, tmp_path, train=ROWS[:2]).id,
            "only pairs": add_dataset(session, tmp_path, train=ROWS[2:]).id,
            "only ratings": add_dataset(session, tmp_path, train=RATED).id,
            "none": add_dataset(session, tmp_path).id,
            "holdout": part(good.id, "supervised", "holdout"),
            "pairs file": part(good.id, "preference"),
            "empty": add_file(session, tmp_path, [], kind=None).id,
        }
        asked = {"method": "supervised", "training_file": "good", **changed}
        for name in ("training_file", "validation_file"):
            if name in asked:
                asked[name] = known.get(asked[name], asked[name])
        with pytest.raises(AppError) as refused:
            create_tuning_job(session, get_deployment(session, "assistant"), **asked)
        assert refused.value.code == code
        assert said in refused.value.message
        if "validation_file" in changed:
            assert refused.value.param == "validation_file"
            assert asked["validation_file"] in refused.value.message


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_a_hyperparameter_keeps_its_bounds_and_its_type(name: str) -> None:
    known = HYPERPARAMETERS[name]
    method = next(method for method in Method if method in known.methods)
    wrong: list[Any] = ["3", True, float("nan"), [1], 10**400]
    if isinstance(known, Choice):
        for choice in known.choices:
            assert check_hyperparameters({name: choice}, method) == {name: choice}
    else:
        for value in (known.minimum, known.maximum):
            assert check_hyperparameters({name: known.type(value)}, method) == {name: value}
            taken = check_hyperparameters({name: float(value)}, method)[name]
            assert (taken, type(taken)) == (value, known.type)  # a whole number written 3.0 is one
        wrong += [known.minimum / 2 - 1, known.maximum * 2]
        wrong += [1.5] if known.type is int else []
    for value in wrong:
        with pytest.raises(AppError, match=f"'{name}'.*expected 'auto' or ") as refused:
            check_hyperparameters({name: value}, method)
        assert refused.value.param == f"hyperparameters.{name}"
        assert len(refused.value.message) < 300


def test_a_freeze_job_is_named_by_its_data_set(sqlite_database: Database, tmp_path: Path) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        dataset = add_dataset(session, tmp_path, status=DatasetStatus.QUEUED)
        job = tuning.create_freeze_job(session, dataset, created_by="ann")
        assert (job.kind, job.spec, job.deployment) == (
            JobKind.FREEZE,
            {"dataset_id": dataset.id},
            "assistant",
        )
        assert dataset.job_id == job.id


def list_warnings(session: Session, job: Job) -> list[JobEvent]:
    events, _ = list_events(session, job.id)
    return [event for event in events if event.level == "warn"]


def add_judgements(session: Session, dataset: Dataset, **counts: int) -> None:
    """Who taught what: so many judgements for each kind of example, and all of them corrected."""
    for kind, count in counts.items():
        for number in range(count):
            session.add(
                DatasetRow(
                    dataset_id=dataset.id,
                    example_id=f"ex_{kind}_{number}",
                    kind=kind,
                    side="holdout" if number % 7 == 0 else "train",
                    answer_id=f"chatcmpl-{number}",
                    judgement_id=f"fb_{number}",
                )
            )
    session.flush()


@pytest.mark.real_bound
@pytest.mark.parametrize(
    ("method", "taught", "said"),
    [
        ("combined", {"supervised": 20}, None),
        ("combined", {"supervised": 19, "preference": 12}, "19 judgements that teach by method"),
        ("dpo", {"preference": 1}, "1 judgement that teach"),
        ("kto", {"labelled": 19, "supervised": 30}, "1 more. Add ratings or stars, and make a new"),
        ("kto", {"labelled": 20}, None),
    ],
)
def test_a_data_set_of_fewer_than_twenty_judgements_is_refused(
    sqlite_database: Database,
    tmp_path: Path,
    method: str,
    taught: dict[str, int],
    said: str | None,
) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        dataset = add_dataset(session, tmp_path, train=[*ROWS, *RATED])
        add_judgements(session, dataset, **taught)
        ask = {"method": method, "training_file": dataset.id}
        if said is None:
            job = create_tuning_job(session, deployment, **ask)
            (warning,) = list_warnings(session, job)
            assert "has 20 judgements that teach. With fewer than 200" in warning.message
        else:
            with pytest.raises(BadRequest, match=re.escape(said)) as refused:
                create_tuning_job(session, deployment, **ask)
            assert refused.value.code == "too_few_judgements"
            assert "at least 20 are needed" in refused.value.message


@pytest.mark.real_bound
def test_an_upload_is_tuned_on_whatever_its_size(sqlite_database: Database, tmp_path: Path) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        upload = add_file(session, tmp_path, ROWS, kind=None, side=None)
        job = create_tuning_job(session, deployment, method="supervised", training_file=upload.id)
        (warning,) = list_warnings(session, job)
        assert warning.message.startswith("3 examples are very few")
