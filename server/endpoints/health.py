"""`/healthz` and `/readyz` say whether the process is there, and whether it can answer."""

from __future__ import annotations

import json
from typing import Literal, NotRequired

from fastapi import APIRouter, Response
from typing_extensions import TypedDict

from server.endpoints.dependencies import GatewayDep
from server.engines.picture import EngineStatus
from server.engines.reasons import in_public
from server.gateway import Gateway

router = APIRouter(tags=["health"])


class Alive(TypedDict):
    status: Literal["ok"]


class EngineState(TypedDict):
    """An engine as this gateway sees it."""

    id: str
    state: str
    reason: str | None


class Readiness(TypedDict):
    """Whether requests would be answered, and why not."""

    status: Literal["ready", "loading", "failed", "stopping"]
    reason: NotRequired[str]  # absent when it is ready
    engines: list[EngineState]


@router.get("/healthz")
async def healthz() -> Alive:
    """The process runs."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not yet, or no more."}})
async def readyz(gateway: GatewayDep, response: Response) -> Readiness:
    """Ready to answer, loading, or failed and why."""
    picture = gateway.chooser.picture
    engines: list[EngineState] = [
        {"id": engine.id, "state": engine.status, "reason": engine.reason or None}
        for engine in picture.engines.values()
    ]
    if not gateway.stopping and picture.is_ready:
        return {"status": "ready", "engines": engines}
    status, reason = _why_not(gateway)
    response.status_code = 503
    response.headers["retry-after"] = "5"
    return {"status": status, "reason": reason, "engines": engines}


def _why_not(gateway: Gateway) -> tuple[Literal["loading", "failed", "stopping"], str]:
    """From the picture, and from what the supervisor wrote about the managed engine."""
    if gateway.stopping:
        return "stopping", "the gateway is shutting down"
    picture = gateway.chooser.picture
    try:
        state = json.loads(
            (gateway.settings.run_dir / "supervisor.json").read_text(encoding="utf-8")
        )
        engine = state["children"]["engine"]
    except (OSError, ValueError, KeyError, TypeError):
        engine = None
    why = in_public(str((engine or {}).get("reason") or "see its log"))
    if engine is not None and engine.get("state") == "failed":
        return "failed", f"the engine does not start: {why}"
    if engine is not None and engine.get("state") == "backoff":
        return "loading", f"the engine ended and is started again: {why}"
    if any(engine.status is EngineStatus.FAILED for engine in picture.engines.values()):
        return "failed", picture.explain_not_ready()
    if gateway.settings.engine.urls and picture.engines:
        return "loading", picture.explain_not_ready()
    return "loading", "the engine is starting; the first start takes about a minute"
