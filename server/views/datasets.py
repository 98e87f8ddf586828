"""Data sets: what was frozen, what was dropped and why, and the files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from feedback.curation.examples import ExampleKind, Side
from feedback.curation.files import OPENAI, TRL
from feedback.datasets import NO_ROWS, list_dataset_files
from feedback.tables import Dataset, DatasetStatus
from server.views.objects import one_of, unix


class DatasetObject(TypedDict):
    """Judged answers, frozen. A kind without rows has no file: null."""

    id: str
    object: Literal["dataset"]
    deployment: str
    status: Annotated[str, one_of(DatasetStatus)]
    counts: dict[str, int]
    dropped: dict[str, int]
    content_hash: str | None
    files: dict[str, str | None]
    holdout_files: dict[str, str | None]
    openai_files: dict[str, str | None]
    error: str | None
    policy_hash: str | None
    created_at: int
    ready_at: int | None


def view_dataset(session: Session, row: Dataset) -> DatasetObject:
    """A data set with its files."""
    files = list_dataset_files(session, row.id)

    def find(side: Side, dialect: str, kinds: Collection[ExampleKind]) -> dict[str, str | None]:
        found = {
            file.kind: file.id for file in files if (file.side, file.dialect) == (side, dialect)
        }
        return {kind.value: found.get(kind.value) for kind in kinds}

    return {
        "id": row.id,
        "object": "dataset",
        "deployment": row.deployment,
        "status": row.status,
        "counts": {**NO_ROWS, **row.counts},
        "dropped": row.dropped,
        "content_hash": row.content_hash,
        "files": find(Side.TRAIN, TRL, tuple(ExampleKind)),
        "holdout_files": find(Side.HOLDOUT, TRL, tuple(ExampleKind)),
        "openai_files": find(Side.TRAIN, OPENAI, (ExampleKind.SUPERVISED, ExampleKind.PREFERENCE)),
        "error": row.error,
        "policy_hash": row.policy_hash,
        "created_at": unix(row.created_at),
        "ready_at": unix(row.ready_at),
    }
