"""`/admin/explain`: where a release comes from, and what became of an answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from feedback.answers import get_answer
from server.access import get_release
from server.sessions import CallerDep, ReadSession
from tuner.explain import explain_answer, explain_release

router = APIRouter(tags=["releases"])


@router.get("/admin/explain/{subject}")
def explain(subject: str, caller: CallerDep, session: ReadSession) -> dict[str, Any]:
    """Explain a release (`assistant@3`) or an answer (`chatcmpl-…`)."""
    if "@" in subject:
        return explain_release(session, get_release(session, caller, subject).name)
    return explain_answer(session, get_answer(session, subject, caller.viewer()).id)
