"""Rows that tests of routes begin with: an answer, a data set, a candidate with its evaluation.

Made by the functions that make them in earnest, without an engine or a worker.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from feedback import datasets
from feedback.answers import messages_hash, root_hash
from feedback.curation.policy import Policy
from feedback.db import Database, Driver, new_id, now
from feedback.people import find_or_create_person
from feedback.recording import EndedAnswer, StartedAnswer, record_ended, record_started
from feedback.tables import AnswerKind, AnswerStatus, Arm, Dataset
from tuner.deployments import create_deployment, get_deployment
from tuner.evaluation.evaluations import create_evaluation
from tuner.releases import create_release
from tuner.tables import Adapter, Decision, Evaluation, Job, JobStatus, Release
from tuner.tuning import create_freeze_job


def started_answer(person_id: str, **columns: Any) -> StartedAnswer:
    """A chat with the deployment `assistant` that begins; `columns` are other ones of it."""
    values: dict[str, Any] = {
        "id": new_id("chatcmpl-"),
        "person_id": person_id,
        "key_id": None,
        "deployment": "assistant",
        "release": "assistant@0",
        "requested_model": "assistant",
        "arm": Arm.PRODUCTION,
        "propensity": 1.0,
        "generation": 0,
        "engine": None,
        "gateway": "gw_test",
        "kind": AnswerKind.CHAT,
        "messages": [{"role": "user", "content": "hi"}],
        "prefix_hash": new_id(""),
        "root_hash": "root",
        "sampling": {},
    }
    return StartedAnswer(**{**values, **columns})


def add_answer(
    database: Database,
    user: str,
    *,
    end_user: str = "",
    deployment: str = "assistant",
    prompt: str = "What is a heron?",
    text: str = "A bird.",
    status: AnswerStatus = AnswerStatus.COMPLETE,
    finish_reason: str = "stop",
    **columns: Any,
) -> str:
    """A chat answer that has ended; its id. `columns` are further ones of `StartedAnswer`."""
    with database.write() as session:
        person_id = find_or_create_person(session, user, end_user).id
        messages = [{"role": "user", "content": prompt}]
        started = started_answer(
            person_id,
            **{
                "deployment": deployment,
                "release": f"{deployment}@0",
                "requested_model": deployment,
                "engine": "engine-0",
                "messages": messages,
                "prefix_hash": messages_hash(person_id, messages),
                "root_hash": root_hash(messages),
                **columns,
            },
        )
        record_started(Driver.of(session), [started])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish_reason,
        }
        ended = EndedAnswer(
            id=started.id,
            status=status,
            choices=[choice],
            hashes=[messages_hash(person_id, [*messages, choice["message"]])],
            stored=started.stored,
        )
        record_ended(Driver.of(session), [ended])
        return started.id


def add_deployment(database: Database, name: str, **more: Any) -> None:
    """A further deployment on the base of the test's gateway."""
    with database.write() as session:
        create_deployment(
            session,
            name=name,
            base_model="tiny",
            base_revision="sha256-tiny",
            template_hash="template-tiny",
            **more,
        )


def add_dataset(database: Database, data: Path, deployment: str = "assistant") -> Dataset:
    """What was judged so far, frozen as a worker does it."""
    with database.write() as session:
        dataset = datasets.create_dataset(session, deployment, Policy(), created_by="admin")
        create_freeze_job(session, dataset)
    frozen = datasets.freeze(database, dataset.id, data=data, check=lambda: None)
    with database.write() as session:
        dataset = datasets.finish_freeze(session, dataset.id, frozen)
        end_job(session, dataset.job_id or "")
        return dataset


def add_candidate(
    database: Database,
    deployment: str = "assistant",
    *,
    adapter: Adapter | None = None,
    **more: Any,
) -> str:
    """A release that is not production; its name. Without an adapter it has a prompt of its own."""
    with database.write() as session:
        if adapter is not None:
            session.add(adapter)
            session.flush()
        values = {"system_prompt": None if adapter else "Be brief.", "sampling": {}, **more}
        row = create_release(
            session, get_deployment(session, deployment), adapter=adapter, **values
        )
        return row.name


def build_adapter() -> Adapter:
    """A row of an adapter that no store has."""
    return Adapter(
        id=new_id("ad_"),
        content_hash=secrets.token_hex(32),
        r=8,
        lora_alpha=16,
        target_modules=["q_proj"],
        base_model="tiny",
        base_revision="sha256-tiny",
        template_hash="template-tiny",
        bytes=1,
    )


def add_evaluation(
    database: Database, release: str, decision: Decision = Decision.PASS
) -> Evaluation:
    """An evaluation of `release` against production that has decided so."""
    with database.write() as session:
        row, job = create_evaluation(session, session.get_one(Release, release))
        row.decision, row.reasons, row.finished_at = decision, ["It was decided."], now()
        end_job(session, job.id)
        return row


def end_job(session: Session, job_id: str, status: JobStatus = JobStatus.SUCCEEDED) -> None:
    """The job has ended, as a worker leaves it."""
    job = session.get_one(Job, job_id)
    job.status, job.finished_at = status, now()
