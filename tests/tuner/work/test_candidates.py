"""The rows of a candidate that tests of the worker don't reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from feedback.db import Database
from tests.tuner.records import (
    REVISION,
    TEMPLATE,
    add_dataset,
    add_file,
    make_adapter,
    make_candidate,
    make_deployment,
    supervised,
)
from tuner.adapters import AdapterFacts
from tuner.base_models import BaseModel
from tuner.chat_template import ChatTemplate
from tuner.control_tokens import ControlTokens
from tuner.deployments import get_deployment
from tuner.jobs import JobFailed
from tuner.moves import move_production
from tuner.tables import Job
from tuner.tuning import create_tuning_job
from tuner.work import candidates

ROWS = [supervised("ex_1", "One?", "First."), supervised("ex_2", "Two?", "Second.")]
BASE = BaseModel(
    name="tiny",
    path=Path("/models/tiny"),
    revision=REVISION,
    template_hash=TEMPLATE,
    architecture="llama",
    max_position_embeddings=512,
    vocab_size=320,
    eos_token_ids=(2,),
    linear_modules={},
    chat_template=ChatTemplate("{{ messages[0]['content'] }}"),
    control_tokens=ControlTokens(),
)


def facts_of(content_hash: str) -> AdapterFacts:
    return AdapterFacts(content_hash, 8, 16.0, ("q_proj",), 1000, 4000, "float32")


def make_job(session: Session, data: Path) -> Job:
    dataset = add_dataset(session, data, train=ROWS)
    deployment = get_deployment(session, "assistant")
    return create_tuning_job(
        session,
        deployment,
        method="supervised",
        training_file=dataset.id,
        person_id="person_1",
        created_by="ann",
    )


def test_a_known_adapter_keeps_its_row_and_gets_missing_figures(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        make_deployment(session)
        known = make_adapter(session, probe=None, origin="import")
        job = make_job(session, tmp_path)
        probe = {"base": [[-1.0]], "adapter": [[-2.0]]}
        facts = facts_of(known.content_hash)
        found = candidates.create_candidate(session, job, facts, BASE, probe=probe)
        assert (found.adapter.id, found.adapter.origin) == (known.id, "import")
        assert found.adapter.probe == probe
        again = candidates.create_candidate(session, job, facts, BASE, probe={"other": 1})
        assert again.adapter.probe == probe
        assert [found.release.name, again.release.name] == ["assistant@1", "assistant@2"]


def test_the_evaluation_is_against_what_is_production_then(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        job = make_job(session, tmp_path)
        make_candidate(session, system_prompt="Be kind.", sampling={"top_p": 0.9})
        move_production(session, "assistant", 1, expected_generation=0)
        found = candidates.create_candidate(session, job, facts_of("b" * 64), BASE, probe=None)
        assert found.evaluation is not None
        assert (found.evaluation.baseline, found.not_evaluated) == ("assistant@1", None)
        assert (found.release.system_prompt, found.release.sampling) == (
            "Be kind.",
            {"top_p": 0.9},
        )


def test_what_was_trained_on_has_one_hash(sqlite_database: Database, tmp_path: Path) -> None:
    with sqlite_database.write() as session:
        make_deployment(session)
        job = make_job(session, tmp_path)
        files = candidates.get_training_files(session, job)
        assert candidates.find_data_hash(session, job, files) == "c" * 64
        upload = add_file(session, tmp_path, ROWS, kind=None, side=None)
        one = create_tuning_job(
            session,
            get_deployment(session, "assistant"),
            method="supervised",
            training_file=upload.id,
        )
        assert candidates.find_data_hash(session, one, [upload]) == upload.sha256


def test_files_are_verified_before_they_are_read(sqlite_database: Database, tmp_path: Path) -> None:
    checks: list[None] = []
    with sqlite_database.write() as session:
        file = add_file(session, tmp_path, ROWS)
    candidates.verify_files([file], tmp_path, check=lambda: checks.append(None))
    assert len(checks) == 1
    (tmp_path / file.path).write_bytes(b"")
    with pytest.raises(JobFailed, match=r"has changed on disk: found sha256 e3b0c442"):
        candidates.verify_files([file], tmp_path, check=lambda: None)
