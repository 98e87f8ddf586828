"""`/metrics`: the gateway's figures for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from server.access.visibility import check_unlimited
from server.endpoints.dependencies import CallerDep, GatewayDep
from server.metrics import CONTENT_TYPE, build_metrics

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=PlainTextResponse)
async def read_metrics(caller: CallerDep, gateway: GatewayDep) -> PlainTextResponse:
    """Figures of this gateway."""
    check_unlimited(caller, "what a gateway counts")
    return PlainTextResponse(build_metrics(gateway), media_type=CONTENT_TYPE)
