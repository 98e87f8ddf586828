"""Rows and files that several tests of the loop begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from feedback.db import Database, canonical_json, new_id, now
from feedback.tables import Dataset, DatasetStatus, File
from tuner.deployments import create_deployment, get_deployment
from tuner.releases import create_release
from tuner.tables import Adapter, Decision, Deployment, Evaluation, Release

REVISION = "rev-1"
TEMPLATE = "template-1"


def make_deployment(session: Session, name: str = "assistant", **values: Any) -> Deployment:
    """A deployment over the base `tiny`, with its release 0."""
    return create_deployment(
        session,
        **{
            "name": name,
            "base_model": "tiny",
            "base_revision": REVISION,
            "template_hash": TEMPLATE,
            **values,
        },
    )


def make_adapter(session: Session, seed: int = 1, **values: Any) -> Adapter:
    """A row for weights that exist nowhere."""
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    adapter = Adapter(
        **{
            "id": f"ad_{digest[:24]}",
            "content_hash": digest,
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj"],
            "base_model": "tiny",
            "base_revision": REVISION,
            "template_hash": TEMPLATE,
            "bytes": 1000,
            **values,
        }
    )
    session.add(adapter)
    session.flush()
    return adapter


def make_candidate(
    session: Session, deployment: str = "assistant", *, seed: int = 1, **values: Any
) -> Release:
    """The deployment's next release, with an adapter of its own."""
    if "adapter" not in values:
        values["adapter"] = make_adapter(session, seed)
    return create_release(
        session,
        get_deployment(session, deployment),
        **{"system_prompt": None, "sampling": {}, **values},
    )


def make_candidates(database: Database, candidates: int = 2) -> None:
    """A deployment with this many candidates."""
    with database.write() as session:
        make_deployment(session)
        for seed in range(candidates):
            make_candidate(session, seed=seed)


def decide_evaluation(
    session: Session,
    release: Release,
    baseline: str = "assistant@0",
    decision: Decision = Decision.PASS,
) -> Evaluation:
    """A finished evaluation of `release`."""
    evaluation = Evaluation(
        id=new_id("eval_"),
        deployment=release.deployment,
        release=release.name,
        baseline=baseline,
        decision=decision,
        reasons=[f"It is a {decision}."],
        finished_at=now(),
    )
    session.add(evaluation)
    session.flush()
    return evaluation


def supervised(row_id: str, question: str, answer: str) -> dict[str, Any]:
    """A training row of one turn."""
    return {
        "id": row_id,
        "kind": "supervised",
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def preference(row_id: str, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A pair of one turn."""
    return {
        "id": row_id,
        "kind": "preference",
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def add_file(
    session: Session, data: Path, rows: Iterable[Mapping[str, Any]], **values: Any
) -> File:
    """A file below `data` and its row."""
    content = "".join(canonical_json(row) + "\n" for row in rows).encode()
    file_id = new_id("file-")
    path = data / "files" / f"{file_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    file = File(
        **{
            "id": file_id,
            "filename": f"{file_id}.jsonl",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "path": f"files/{file_id}.jsonl",
            "rows": content.count(b"\n"),
            "kind": "supervised",
            "side": "train",
            **values,
        }
    )
    session.add(file)
    session.flush()
    return file


def add_dataset(
    session: Session,
    data: Path,
    *,
    train: Iterable[Mapping[str, Any]] = (),
    holdout: Iterable[Mapping[str, Any]] = (),
    deployment: str = "assistant",
    status: DatasetStatus = DatasetStatus.READY,
) -> Dataset:
    """A data set of these rows: a file per kind and side."""
    counts = {"supervised": 0, "preference": 0, "labelled": 0, "holdout": 0}
    dataset = Dataset(id=new_id("ds_"), deployment=deployment, status=status, content_hash="c" * 64)
    session.add(dataset)
    session.flush()
    for side, rows in (("train", list(train)), ("holdout", list(holdout))):
        for kind in sorted({row["kind"] for row in rows}):
            part = [row for row in rows if row["kind"] == kind]
            counts[kind if side == "train" else "holdout"] += len(part)
            add_file(session, data, part, kind=kind, side=side, dataset_id=dataset.id)
    dataset.counts = counts
    session.flush()
    return dataset
