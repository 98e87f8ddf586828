"""Data sets: judged answers, frozen into files that never change again.

Owns: the rows of `datasets` and `dataset_rows`, and the freeze from judged answers to files.
Covered: a freeze that is killed and begins anew, two at once, answers that are judged or deleted
meanwhile (the set has each answer as it was when it was read). Does not own: what a verdict teaches
and which examples are chosen (`curation/`), the job that freezes (`tuner/work/freeze.py`).

Texts are never held at once: they go to a spool on disk, and what is in memory of an example is its
feature.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from sys import intern
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from feedback.curation.examples import ExampleKind, Feature, Side
from feedback.curation.extractions import extract_all, list_extractions
from feedback.curation.files import (
    FilesWriter,
    Spool,
    WrittenFile,
    sync_folder,
    write_manifest,
)
from feedback.curation.judged import drop_of_conversation
from feedback.curation.policy import EXTRACTION_VERSION, Policy
from feedback.curation.select import Chosen, Standing
from feedback.curation.select import select as select_examples
from feedback.db import Database, new_id, now
from feedback.errors import Conflict, NotFound
from feedback.tables import Dataset, DatasetRow, DatasetStatus, File, Judgement

FOLDER = "datasets"
"""Below the directory that holds everything: a folder for each data set, named by its id."""

MANIFEST_VERSION = 1
ROWS_PER_WRITE = 500

NO_ROWS: Mapping[str, int] = dict.fromkeys((*map(str, ExampleKind), str(Side.HOLDOUT)), 0)
"""The counts of a data set without rows: examples by kind, and those that are held out."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a freeze wrote, for `finish_freeze` to record."""

    dataset_id: str
    policy_hash: str
    counts: Mapping[str, int]  #: training rows by kind, and `holdout`: its rows of all kinds
    dropped: Mapping[str, int]
    content_hash: str
    files: tuple[WrittenFile, ...]


def create_dataset(
    session: Session, deployment: str, policy: Policy, *, created_by: str | None
) -> Dataset:
    """A data set that waits to be frozen from the deployment's judged answers."""
    dataset = Dataset(
        id=new_id("ds_"),
        deployment=deployment,
        status=DatasetStatus.QUEUED,
        policy=policy.to_json(),
        policy_hash=policy.hash,
        created_by=created_by,
    )
    session.add(dataset)
    session.flush()
    return dataset


def get_dataset(session: Session, dataset_id: str) -> Dataset:
    """The data set; NotFound where there is none."""
    dataset = session.get(Dataset, dataset_id)
    if dataset is None:
        raise NotFound(f"no data set {dataset_id!r}; the list of data sets names those that exist")
    return dataset


def list_datasets(
    session: Session,
    *,
    deployments: Collection[str] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> tuple[list[Dataset], bool]:
    """Data sets, newest first, and whether there are more; `after` is the last id seen.

    `deployments` None means all of them.
    """
    statement = select(Dataset)
    if deployments is not None:
        statement = statement.where(Dataset.deployment.in_(deployments))
    if after is not None:
        statement = statement.where(Dataset.id < get_dataset(session, after).id)
    rows = list(session.scalars(statement.order_by(Dataset.id.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def list_dataset_files(session: Session, dataset_id: str) -> list[File]:
    """All files of a data set: both sides, both dialects."""
    statement = select(File).where(File.dataset_id == dataset_id)
    return list(session.scalars(statement.order_by(File.kind, File.side.desc(), File.dialect)))


def freeze(database: Database, dataset_id: str, *, data: Path, check: Callable[[], None]) -> Frozen:
    """Write the data set's files and rows; `finish_freeze` makes it ready.

    The files lie below `data / "datasets" / <id>` all at once or not at all, and what an earlier
    attempt left is removed. `check` is called between pages; what it raises ends the freeze. Raises
    NotFound, and Conflict for a data set that is ready.
    """
    with database.write() as session:
        dataset = _lock_unfinished(session, dataset_id)
        dataset.status = DatasetStatus.RUNNING
        dataset.error = None
    policy = Policy.from_json(dataset.policy)
    home = data / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    _remove_partial(home, dataset_id)
    folder = Path(tempfile.mkdtemp(prefix=f"{dataset_id}.", suffix=".partial", dir=home))
    try:
        frozen = _write(database, dataset, policy, folder, check)
        _publish(database, dataset_id, folder, home / dataset_id, check)
    finally:
        _remove_partial(home, dataset_id)
    return frozen


def finish_freeze(session: Session, dataset_id: str, frozen: Frozen) -> Dataset:
    """Record what `freeze` wrote: from now on the data set is ready and changes no more.

    Raises Conflict where it is ready already, or its rows are those of another attempt.
    """
    dataset = _lock_unfinished(session, dataset_id)
    rows = session.scalar(
        select(func.count()).select_from(DatasetRow).where(DatasetRow.dataset_id == dataset_id)
    )
    expected = sum(frozen.counts.values())
    if rows != expected:
        raise Conflict(
            f"{dataset_id} has {rows} rows, expected {expected}: another attempt is freezing it",
            code="dataset_changed",
        )
    session.add_all(
        File(
            id=new_id("file-"),
            filename=f"{dataset_id}.{file.filename}",
            bytes=file.bytes,
            sha256=file.sha256,
            path=file.path,
            rows=file.rows,
            kind=file.kind,
            side=file.side,
            dialect=file.dialect,
            dataset_id=dataset_id,
        )
        for file in frozen.files
    )
    dataset.status = DatasetStatus.READY
    dataset.error = None
    dataset.counts = dict(frozen.counts)
    dataset.dropped = dict(frozen.dropped)
    dataset.content_hash = frozen.content_hash
    dataset.policy_hash = frozen.policy_hash
    dataset.ready_at = now()
    session.flush()
    return dataset


def what_became(session: Session, verdict_id: str) -> dict[str, list[dict[str, Any]]]:
    """What a judgement or a comparison became: examples, data sets that hold them, and drops.

    Examples and drops are those of the newest extraction; before the first freeze there are none.
    Why an example that was made is not in a data set (a cap, a majority) its manifest says.
    """
    rows = session.execute(
        select(DatasetRow, Dataset.deployment)
        .join(Dataset, Dataset.id == DatasetRow.dataset_id)
        .where(DatasetRow.judgement_id == verdict_id, Dataset.status == DatasetStatus.READY)
        .order_by(DatasetRow.dataset_id, DatasetRow.example_id)
    ).all()
    examples = {row.example_id: row.kind for row, _ in rows}
    drops: dict[tuple[str, str | None], None] = {}
    for extraction in list_extractions(session, verdict_id):
        for value in extraction.examples:
            if value["feature"]["judgement_id"] == verdict_id:
                examples[value["feature"]["example_id"]] = value["feature"]["kind"]
        for value in extraction.drops:
            if value["judgement_id"] == verdict_id:
                drops[value["reason"], value["kind"]] = None
    judgement = session.get(Judgement, verdict_id)
    if judgement is not None and judgement.conversation_id is not None:
        drops[drop_of_conversation(judgement).reason.value, None] = None
    return {
        "examples": [{"id": example_id, "kind": kind} for example_id, kind in examples.items()],
        "datasets": [
            {
                "id": row.dataset_id,
                "deployment": deployment,
                "example_id": row.example_id,
                "kind": row.kind,
                "side": row.side,
            }
            for row, deployment in rows
        ],
        "drops": [{"reason": reason, "kind": kind} for reason, kind in drops],
    }


def _write(
    database: Database, dataset: Dataset, policy: Policy, folder: Path, check: Callable[[], None]
) -> Frozen:
    """Extract, select, and write everything to `folder`, which no one else knows yet."""
    with Spool(folder / "rows.spool") as rows, Spool(folder / "drops.spool") as drops:
        dropped: Counter[str] = Counter()
        features: list[Feature] = []
        for extracted in extract_all(database, dataset.deployment, policy, check):
            for example in extracted.examples:
                features.append(_make_compact(example.feature, rows.append(example.row)))
            for drop in extracted.drops:
                drops.append(drop.to_json())
                dropped[drop.reason.value] += 1
        people = dict.fromkeys(policy.excluded_people, Standing.EXCLUDED)
        selection = select_examples(features, people, policy)
        dropped.update(drop.reason.value for drop in selection.drops)
        _replace_rows(database, dataset.id, selection.chosen, check)

        writer = FilesWriter(folder)
        try:
            for number, chosen in enumerate(selection.chosen):
                if number % ROWS_PER_WRITE == 0:
                    check()
                writer.add(chosen.side, rows.read(chosen.feature.position))
            files, content_hash = writer.finish(f"{FOLDER}/{dataset.id}")
        finally:
            writer.close()
        frozen = Frozen(
            dataset_id=dataset.id,
            policy_hash=policy.hash,
            counts=_count(selection.chosen),
            dropped=dict(sorted(dropped.items())),
            content_hash=content_hash,
            files=files,
        )
        facts = {
            "id": dataset.id,
            "deployment": dataset.deployment,
            "policy": policy.to_json(),
            "policy_hash": policy.hash,
            "counts": frozen.counts,
            "dropped": frozen.dropped,
            "content_hash": content_hash,
            "versions": {"manifest": MANIFEST_VERSION, "extraction": EXTRACTION_VERSION},
        }
        write_manifest(
            folder, facts, files, chain(drops, (drop.to_json() for drop in selection.drops))
        )
    sync_folder(folder)
    return frozen


def _make_compact(feature: Feature, position: int) -> Feature:
    """The feature with its row's place; strings that many features share are held once."""
    return replace(
        feature,
        position=position,
        kind=intern(feature.kind),
        person_id=intern(feature.person_id),
        answer_id=intern(feature.answer_id),
        judgement_id=intern(feature.judgement_id),
        root_hash=intern(feature.root_hash),
        prompt_hash=intern(feature.prompt_hash),
        near_hash=intern(feature.near_hash),
    )


def _replace_rows(
    database: Database, dataset_id: str, chosen: Sequence[Chosen], check: Callable[[], None]
) -> None:
    """Write which answer became which example; an earlier attempt's rows are removed first."""
    earlier = (
        select(DatasetRow.example_id)
        .where(DatasetRow.dataset_id == dataset_id)
        .limit(ROWS_PER_WRITE)
    )
    while True:
        check()
        with database.write() as session:
            _lock_unfinished(session, dataset_id)
            example_ids = session.scalars(earlier).all()
            session.execute(
                delete(DatasetRow)
                .where(DatasetRow.dataset_id == dataset_id, DatasetRow.example_id.in_(example_ids))
                .execution_options(synchronize_session=False)
            )
        if len(example_ids) < ROWS_PER_WRITE:
            break
    for start in range(0, len(chosen), ROWS_PER_WRITE):
        check()
        rows = [
            {
                "dataset_id": dataset_id,
                "example_id": item.feature.example_id,
                "kind": item.feature.kind,
                "side": item.side.value,
                "answer_id": item.feature.answer_id,
                "person_id": item.feature.person_id,
                "judgement_id": item.feature.judgement_id,
            }
            for item in chosen[start : start + ROWS_PER_WRITE]
        ]
        with database.write() as session:
            _lock_unfinished(session, dataset_id)
            session.execute(insert(DatasetRow), rows)


def _publish(
    database: Database, dataset_id: str, folder: Path, final: Path, check: Callable[[], None]
) -> None:
    """Give the finished folder its name.

    Under the lock of the row, so that an attempt that lost its lease cannot replace a ready set.
    """
    with database.write() as session:
        _lock_unfinished(session, dataset_id)
        check()
        if final.exists():
            os.rename(final, final.with_name(f"{dataset_id}.earlier.partial"))
        os.rename(folder, final)
    sync_folder(final.parent)


def _remove_partial(home: Path, dataset_id: str) -> None:
    for folder in home.glob(f"{dataset_id}.*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def _lock_unfinished(session: Session, dataset_id: str) -> Dataset:
    """The data set, held until the transaction ends; Conflict where it is ready."""
    dataset = session.scalar(select(Dataset).where(Dataset.id == dataset_id).with_for_update())
    if dataset is None:
        raise NotFound(f"no data set {dataset_id!r}; it was removed while it was being frozen")
    if dataset.status == DatasetStatus.READY:
        raise Conflict(
            f"{dataset_id} is ready and never changes; make another", code="dataset_ready"
        )
    return dataset


def _count(chosen: Sequence[Chosen]) -> dict[str, int]:
    counts = dict(NO_ROWS)
    for item in chosen:
        counts[item.feature.kind if item.side == Side.TRAIN else Side.HOLDOUT.value] += 1
    return counts
