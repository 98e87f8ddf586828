"""`/admin/adapters`: LoRA weights, named by their content."""

from __future__ import annotations

from fastapi import APIRouter

from server.access import visibility
from server.endpoints.dependencies import CallerDep, ReadSession
from server.views.adapters import AdapterObject, view_adapter

router = APIRouter(tags=["releases"])


@router.get("/admin/adapters/{adapter_id}")
def get_adapter(adapter_id: str, caller: CallerDep, session: ReadSession) -> AdapterObject:
    """One adapter and the releases that answer with it."""
    row, releases = visibility.get_adapter(session, caller, adapter_id)
    return view_adapter(session, caller, row, releases)
