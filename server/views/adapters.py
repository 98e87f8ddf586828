"""LoRA weights, and the releases that answer with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from server.access.keyring import Caller
from server.access.visibility import sees
from server.views.objects import unix
from tuner.tables import Adapter, Job, Release


class AdapterObject(TypedDict):
    """LoRA weights as the API shows them."""

    id: str
    object: Literal["adapter"]
    content_hash: str
    r: int
    lora_alpha: float
    target_modules: list[str]
    base_model: str
    base_revision: str
    template_hash: str | None
    bytes: int
    origin: str
    job_id: str | None
    releases: list[str]
    created_at: int


def view_adapter(
    session: Session, caller: Caller, row: Adapter, releases: Sequence[Release]
) -> AdapterObject:
    """An adapter with those of its `releases` that the caller sees."""
    job = None if row.job_id is None else session.get(Job, row.job_id)
    return {
        "id": row.id,
        "object": "adapter",
        "content_hash": row.content_hash,
        "r": row.r,
        "lora_alpha": row.lora_alpha,
        "target_modules": row.target_modules,
        "base_model": row.base_model,
        "base_revision": row.base_revision,
        "template_hash": row.template_hash,
        "bytes": row.bytes,
        "origin": row.origin,
        # The same weights may come of a job for another deployment.
        "job_id": row.job_id if job is None or sees(caller, job.deployment) else None,
        "releases": [release.name for release in releases],
        "created_at": unix(row.created_at),
    }
