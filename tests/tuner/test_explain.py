"""`burnish explain`: from a release back to people, and from an answer on to releases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from feedback import audit
from feedback.comparisons import NewComparison, compare
from feedback.curation.policy import Policy
from feedback.datasets import create_dataset, finish_freeze, freeze
from feedback.db import Database
from feedback.errors import NotFound
from feedback.judgements import NewJudgement, judge, withdraw
from feedback.people import Viewer
from feedback.tables import Dataset, DatasetRow
from tests.feedback.record import ask, make_viewer
from tests.tuner.records import (
    add_file,
    decide_evaluation,
    make_adapter,
    make_candidate,
    make_deployment,
    supervised,
)
from tuner import jobs
from tuner.deployments import get_deployment
from tuner.explain import explain_answer, explain_release
from tuner.moves import move_production
from tuner.releases import create_release
from tuner.tables import Adapter, Decision, Job
from tuner.tuning import create_tuning_job

SECRET = "the colour of my door is ochre"


@dataclass
class Loop:
    """A record that was judged, frozen, trained on and promoted."""

    answers: dict[str, str]
    dataset: Dataset
    job: Job


def say(session: Session, viewer: Viewer, answer: str, kind: str, value: Any) -> str:
    new = NewJudgement(kind=kind, value=value, completion_id=answer)
    return judge(session, viewer, new)[0].id


def run_loop(database: Database, data: Path) -> Loop:
    with database.write() as session:
        make_deployment(session, system_prompt=f"Say that {SECRET}.")
        ann, bob = make_viewer(session, "ann"), make_viewer(session, "bob")
        corrected = ask(session, ann, f"Is it so that {SECRET}?", "I don't know.")
        say(session, ann, corrected, "correction", f"Yes, {SECRET}.")
        say(session, ann, corrected, "comment", f"You should know that {SECRET}.")
        liked = ask(session, bob, "What is rain?", "Water.")
        say(session, bob, liked, "rating", True)
        withdraw(session, bob, say(session, bob, liked, "stars", 2))
        other = ask(session, bob, "What is rain?", "Rain is water that falls from clouds.")
        pair = NewComparison(completion_ids=(liked, other), preferred="b")
        compare(session, bob, pair)
        dataset = create_dataset(session, "assistant", Policy(holdout_share=0.0), created_by="ann")
    frozen = freeze(database, dataset.id, data=data, check=lambda: None)
    with database.write() as session:
        dataset = finish_freeze(session, dataset.id, frozen)
        job = create_tuning_job(
            session,
            get_deployment(session, "assistant"),
            method="dpo",
            training_file=dataset.id,
            hyperparameters={"beta": 0.2},
            seed=7,
            created_by="ann",
        )
        held = jobs.claim_job(session, "w", kinds=["tune"])
        assert held is not None
        release = make_candidate(
            session,
            adapter=make_adapter(session, job_id=job.id),
            job_id=job.id,
            dataset_id=dataset.id,
            created_by="ann",
        )
        jobs.finish(session, held, {"metrics": {"loss": 0.5}, "manifest": {"epochs": 2}})
        decide_evaluation(session, release, decision=Decision.FAIL)
        evaluation = decide_evaluation(session, release, decision=Decision.PASS)
        move_production(session, "assistant", 1, expected_generation=0)
        details = {
            "from": "assistant@0",
            "generation": 1,
            "note": "better",
            "force": False,
            "evaluation": evaluation.id,
            "decision": "pass",
        }
        for action, subject in (("promote", release.name), ("promote", "assistant@9")):
            audit.append(session, actor="ann", action=action, subject=subject, details=details)
        audit.append(session, actor="gateway", action="release_failed", subject=release.name)
        answers = {"corrected": corrected, "liked": liked, "other": other}
    return Loop(answers, dataset, job)


def test_a_release_leads_back_to_job_data_evaluations_and_promotion(
    database: Database, tmp_path: Path
) -> None:
    loop = run_loop(database, tmp_path)
    with database.read() as session:
        found = explain_release(session, "assistant@1")
    assert SECRET not in json.dumps(found)
    assert (found["release"]["role"], found["release"]["created_by"]) == ("production", "ann")
    assert found["adapter"]["id"].startswith("ad_")
    job = found["job"]
    assert (job["id"], job["method"], job["seed"]) == (loop.job.id, "dpo", 7)
    assert (job["hyperparameters"], job["manifest"]) == ({"beta": 0.2}, {"epochs": 2})
    dataset = found["dataset"]
    assert (dataset["id"], dataset["people"], dataset["answers"]) == (loop.dataset.id, 2, 3)
    assert dataset["content_hash"] == loop.dataset.content_hash
    assert dataset["policy_hash"] == loop.dataset.policy_hash
    assert dataset["counts"] == loop.dataset.counts
    assert [file["kind"] for file in found["sources"]["files"]] == ["preference", "supervised"]
    assert found["sources"]["left_out"] == []
    assert [row["decision"] for row in found["evaluations"]] == ["fail", "pass"]
    (move,) = found["moves"]
    assert (move["action"], move["actor"], move["from"]) == ("promote", "ann", "assistant@0")
    assert (move["decision"], move["note"], move["force"]) == ("pass", "better", False)


def test_a_release_with_another_prompt_has_its_adapters_job(
    sqlite_database: Database, tmp_path: Path
) -> None:
    loop = run_loop(sqlite_database, tmp_path)
    with sqlite_database.write() as session:
        adapter = session.query(Adapter).one()
        create_release(
            session,
            get_deployment(session, "assistant"),
            adapter=adapter,
            system_prompt="Other.",
            sampling={},
        )
        assert explain_release(session, "assistant@2")["job"]["id"] == loop.job.id
        answer = explain_answer(session, loop.answers["corrected"])
    by_kind = {row["kind"]: row for row in answer["judgements"]}
    assert by_kind["correction"]["releases"] == ["assistant@1", "assistant@2"]


def test_the_base_explains_itself_without_job_or_data(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        found = explain_release(session, "assistant@0")
    assert (found["adapter"], found["job"], found["dataset"]) == (None, None, None)
    assert (found["evaluations"], found["moves"]) == ([], [])
    assert found["release"]["suffix"] is None
    assert found["sources"] == {
        "files": [],
        "validation_file": None,
        "left_out": [],
        "deployment": [],
    }


def test_an_answer_leads_on_to_what_learned_from_it(database: Database, tmp_path: Path) -> None:
    loop = run_loop(database, tmp_path)
    with database.read() as session:
        corrected = explain_answer(session, loop.answers["corrected"])
        liked = explain_answer(session, loop.answers["liked"])
    assert SECRET not in json.dumps([corrected, liked])
    answer = corrected["answer"]
    assert (answer["release"], answer["arm"], answer["status"]) == (
        "assistant@0",
        "production",
        "complete",
    )
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (12, 7)
    assert answer["started_at"].endswith("+00:00")

    by_kind = {row["kind"]: row for row in corrected["judgements"]}
    correction = by_kind["correction"]
    assert {row["kind"] for row in correction["examples"]} == {"supervised", "preference"}
    assert {row["id"] for row in correction["datasets"]} == {loop.dataset.id}
    assert (correction["releases"], correction["value"]) == (["assistant@1"], None)
    assert [drop["reason"] for drop in by_kind["comment"]["drops"]] == ["teaches_nothing"]
    assert by_kind["comment"]["releases"] == []

    by_kind = {row["kind"]: row for row in liked["judgements"]}
    # A like is a labelled example: it is in the data set, and DPO doesn't learn from it.
    assert by_kind["rating"]["value"] is True
    assert [row["kind"] for row in by_kind["rating"]["datasets"]] == ["labelled"]
    assert by_kind["rating"]["releases"] == []
    assert by_kind["stars"]["withdrawn"]
    (comparison,) = liked["comparisons"]
    assert {loop.answers["liked"], loop.answers["other"]} == set(comparison["completion_ids"])
    assert comparison["releases"] == ["assistant@1"]


def test_no_release_learned_from_what_is_in_the_holdout(
    sqlite_database: Database, tmp_path: Path
) -> None:
    loop = run_loop(sqlite_database, tmp_path)
    with sqlite_database.write() as session:
        session.execute(update(DatasetRow).values(side="holdout"))
        found = explain_answer(session, loop.answers["corrected"])
    by_kind = {row["kind"]: row for row in found["judgements"]}
    assert {row["side"] for row in by_kind["correction"]["datasets"]} == {"holdout"}
    assert by_kind["correction"]["releases"] == []


def test_what_is_unknown_is_not_found(sqlite_database: Database) -> None:
    with sqlite_database.read() as session:
        with pytest.raises(NotFound, match="assistant@1"):
            explain_release(session, "assistant@1")
        with pytest.raises(NotFound, match="chatcmpl-none"):
            explain_answer(session, "chatcmpl-none")


def test_a_release_names_its_suffix_and_what_validated_it(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        deployment = make_deployment(session)
        trained, held = (
            add_file(session, tmp_path, [supervised("ex", question, "Yes.")], side=None)
            for question in ("One?", "Two?")
        )
        job = create_tuning_job(
            session,
            deployment,
            method="supervised",
            training_file=trained.id,
            validation_file=held.id,
            suffix="short answers",
        )
        make_candidate(session, job_id=job.id, suffix="short answers")
        found = explain_release(session, "assistant@1")
    assert found["release"]["suffix"] == "short answers"
    assert found["job"]["validation_file"] == held.id
    assert found["sources"]["validation_file"]["sha256"] == held.sha256
    assert [file["id"] for file in found["sources"]["files"]] == [trained.id]
