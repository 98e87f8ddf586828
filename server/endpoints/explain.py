"""`/admin/explain`: where a release comes from, and what became of an answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from typing_extensions import TypedDict

from feedback.answers import get_answer
from server.access.visibility import get_release
from server.endpoints.dependencies import CallerDep, ReadSession
from tuner.explain import explain_answer, explain_release

router = APIRouter(tags=["releases"])


class ReleaseExplained(TypedDict):
    """Where a release comes from."""

    release: dict[str, Any]
    adapter: dict[str, Any] | None
    job: dict[str, Any] | None
    dataset: dict[str, Any] | None
    sources: dict[str, Any]
    evaluations: list[dict[str, Any]]
    moves: list[dict[str, Any]]


class AnswerExplained(TypedDict):
    """What became of an answer."""

    answer: dict[str, Any]
    judgements: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


@router.get("/admin/explain/{subject}", response_model=ReleaseExplained | AnswerExplained)
def explain(subject: str, caller: CallerDep, session: ReadSession) -> dict[str, Any]:
    """Explain a release (`assistant@3`) or an answer (`chatcmpl-…`)."""
    if "@" in subject:
        return explain_release(session, get_release(session, caller, subject).name)
    answer = get_answer(session, subject, caller.viewer())
    return explain_answer(session, answer.id, deployments=caller.key.deployments)
