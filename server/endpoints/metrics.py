"""`/metrics`: the gateway's figures for Prometheus.

Owns: the figures that are read from the gateway's state when it is asked. All come from memory:
they are there when the database is not. Does not own: what is counted (`server/metrics.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from server.access.visibility import check_unlimited
from server.endpoints.dependencies import CallerDep, GatewayDep
from server.engines.picture import EngineStatus
from server.gateway import Gateway

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=PlainTextResponse)
async def read_metrics(caller: CallerDep, gateway: GatewayDep) -> PlainTextResponse:
    """Figures of this gateway."""
    check_unlimited(caller, "what a gateway counts")
    state = list(collect_state(gateway))
    # Some six thousand lines, where there are as many as may be: 0.15 s in which the event loop has
    # its turns, for a thread gives way every few milliseconds.
    text = await asyncio.to_thread(_write, gateway.figures.registry, state)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def _write(registry: CollectorRegistry, state: list[Metric]) -> bytes:
    return generate_latest(registry) + generate_latest(_State(state))


@dataclass(frozen=True, slots=True)
class _State(Collector):
    """Families that were collected already."""

    families: list[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def collect_state(gateway: Gateway) -> Iterator[Metric]:
    """What the gateway's parts are like at this moment. Called in its event loop."""
    recorder, chooser, snapshot = gateway.recorder, gateway.chooser, gateway.directory.snapshot
    picture = chooser.picture
    known = list(picture.engines.values())
    yield CounterMetricFamily(
        "burnish_recorder_rows_committed_total",
        "Rows of answers (one for the start, one for the end) that were committed.",
        recorder.committed,
    )
    yield CounterMetricFamily(
        "burnish_recorder_rows_lost_total",
        "Ends of answers that went to the dead-letter file.",
        recorder.lost,
    )
    yield GaugeMetricFamily("burnish_recorder_queue_rows", "Rows that wait.", recorder.depth)
    engines = GaugeMetricFamily("burnish_engines", "Engines by state.", labels=["state"])
    for state in EngineStatus:
        engines.add_metric([str(state)], sum(engine.status is state for engine in known))
    yield engines
    running = GaugeMetricFamily(
        "burnish_engine_running_requests", "Requests that run on an engine.", labels=["engine"]
    )
    adapters = GaugeMetricFamily(
        "burnish_engine_adapters", "Adapters that an engine holds.", labels=["engine"]
    )
    for replica in chooser.replicas.values():
        running.add_metric([replica.id], replica.busy)
    yield running
    for engine in known:
        adapters.add_metric([engine.id], len(engine.adapters))
    yield adapters
    yield GaugeMetricFamily(
        "burnish_adapter_slots", "Adapters that an engine may hold.", picture.smallest_slots()
    )
    generations = GaugeMetricFamily(
        "burnish_deployment_generation",
        "Moves of a deployment, and the release that is production.",
        labels=["deployment", "production"],
    )
    for view in snapshot.deployments.values():
        generations.add_metric([view.name, view.production.name], view.generation)
    yield generations
    yield GaugeMetricFamily(
        "burnish_gateway_stopping", "1 while the gateway shuts down.", int(gateway.stopping)
    )
    yield GaugeMetricFamily(
        "burnish_gateway_leading",
        "1 while this gateway leads.",
        int(gateway.leader.is_leading()),
    )
