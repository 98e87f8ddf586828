"""The gateway's figures in Prometheus' text format, version 0.0.4.

Owns: their names, the counters that the hot path bumps, the text. All come from memory: they are
there when the database is not. No label names a person or repeats what was said, and a counter
keeps `MOST_SERIES` combinations of labels, a histogram `MOST_HISTOGRAMS`: what comes after them
counts as `other`. The format is a few lines of text, so no client library and none of its global
registries.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.engines.picture import EngineStatus

if TYPE_CHECKING:
    from server.gateway import Gateway

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_SERIES = 200
MOST_REQUEST_SERIES = 2_000  #: routes are ours and known, and so are statuses
MOST_HISTOGRAMS = 50  #: each is some twenty lines

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_OVERHEAD_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_OTHER = "other"

Sample = tuple[Mapping[str, str], float]


class Counter:
    """Grows; one figure for each combination of labels. Any thread may add."""

    def __init__(self, *labels: str, most: int = MOST_SERIES) -> None:
        self._labels = labels
        self._most = most
        self._figures: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()

    def add(self, *values: str, amount: int = 1) -> None:
        with self._lock:
            if values not in self._figures and len(self._figures) >= self._most:
                values = (_OTHER,) * len(values)
            self._figures[values] = self._figures.get(values, 0) + amount

    def samples(self) -> list[Sample]:
        with self._lock:
            figures = sorted(self._figures.items())
        return [(dict(zip(self._labels, values, strict=True)), n) for values, n in figures]


class Histogram:
    """How often a figure fell below each bound, for each combination of labels.

    The event loop alone observes. A label that isn't given is `other`.
    """

    def __init__(self, bounds: Sequence[float], *labels: str) -> None:
        self.bounds = bounds
        self._labels = labels
        #: labels to how often between two bounds, and the sum
        self._figures: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}

    def observe(self, value: float, *values: str) -> None:
        found = self._figures.get(values) or self._add(values)
        found[0][bisect_left(self.bounds, value)] += 1
        found[1][0] += value

    def _add(self, values: tuple[str, ...]) -> tuple[list[int], list[float]]:
        others = (_OTHER,) * len(self._labels)
        if len(values) != len(others) or len(self._figures) >= MOST_HISTOGRAMS:
            values = others
        return self._figures.setdefault(values, ([0] * (len(self.bounds) + 1), [0.0]))

    def series(self) -> list[tuple[dict[str, str], list[int], float]]:
        """Labels, how often between two bounds, and the sum."""
        return [
            (dict(zip(self._labels, values, strict=True)), counts, total)
            for values, (counts, (total,)) in sorted(self._figures.items())
        ]


class Figures:
    """What the hot path counts."""

    def __init__(self) -> None:
        self.requests = Counter("route", "status", most=MOST_REQUEST_SERIES)
        self.answers = Counter("release", "arm", "status")
        self.prompt_tokens = Counter("release", "arm")
        self.completion_tokens = Counter("release", "arm")
        self.judgements = Counter("kind", "source")
        self.not_recorded = Counter()
        self.integrity_errors = Counter()
        self.connections_ended = Counter("reason")
        labels = ("release", "arm")
        self.duration = {kind: Histogram(_SECONDS, *labels) for kind in ("plain", "streamed")}
        self.first_token = Histogram(_SECONDS, *labels)
        self.overhead = Histogram(_OVERHEAD_SECONDS, *labels)


class CountRequests:
    """Counts replies by the template of their route; pure ASGI."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app = app
        self._requests = figures.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # None before a route was found: an unknown path, or a limit that was reached
                path = getattr(scope.get("route"), "path", _OTHER)
                self._requests.add(path, str(message["status"]))
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)


def build_metrics(gateway: Gateway) -> str:
    """All figures of this gateway at this moment. Called in its event loop."""
    return "".join(line + "\n" for line in _lines(gateway))


def _lines(gateway: Gateway) -> Iterator[str]:
    yield from _traffic_lines(gateway.figures)
    recorder, chooser, snapshot = gateway.recorder, gateway.chooser, gateway.directory.snapshot
    picture = chooser.picture
    engines = list(picture.engines.values())
    yield from _family(
        "burnish_recorder_rows_committed_total",
        "counter",
        "Rows of answers (one for the start, one for the end) that were committed.",
        [({}, recorder.committed)],
    )
    yield from _family(
        "burnish_recorder_rows_lost_total",
        "counter",
        "Ends of answers that went to the dead-letter file.",
        [({}, recorder.lost)],
    )
    yield from _family(
        "burnish_recorder_queue_rows", "gauge", "Rows that wait.", [({}, recorder.depth)]
    )
    yield from _family(
        "burnish_engines",
        "gauge",
        "Engines by state.",
        [
            ({"state": str(state)}, sum(engine.status is state for engine in engines))
            for state in EngineStatus
        ],
    )
    yield from _family(
        "burnish_engine_running_requests",
        "gauge",
        "Requests that run on an engine.",
        [({"engine": target.id}, target.busy) for target in chooser.targets.values()],
    )
    yield from _family(
        "burnish_engine_adapters",
        "gauge",
        "Adapters that an engine holds.",
        [({"engine": engine.id}, len(engine.adapters)) for engine in engines],
    )
    yield from _family(
        "burnish_adapter_slots",
        "gauge",
        "Adapters that an engine may hold.",
        [({}, picture.smallest_slots())],
    )
    yield from _family(
        "burnish_integrity_errors_total",
        "counter",
        "Answers of an engine under another name than it was asked for.",
        gateway.figures.integrity_errors.samples() or [({}, 0)],
    )
    yield from _family(
        "burnish_deployment_generation",
        "gauge",
        "Moves of a deployment, and the release that is production.",
        [
            ({"deployment": view.name, "production": view.production.name}, view.generation)
            for view in snapshot.deployments.values()
        ],
    )
    yield from _family(
        "burnish_gateway_stopping",
        "gauge",
        "1 while the gateway shuts down.",
        [({}, int(gateway.stopping))],
    )


def _traffic_lines(figures: Figures) -> Iterator[str]:
    yield from _family(
        "burnish_requests_total",
        "counter",
        "Replies by route and HTTP status.",
        figures.requests.samples(),
    )
    yield from _family(
        "burnish_answers_total",
        "counter",
        "Chat and text completions that an engine was asked for, by what became of them.",
        figures.answers.samples(),
    )
    yield from _histogram(
        "burnish_request_duration_seconds",
        "From a request's body to the end of its answer, chat and text completions.",
        [({"kind": kind}, histogram) for kind, histogram in figures.duration.items()],
    )
    yield from _histogram(
        "burnish_time_to_first_token_seconds",
        "From a request's body to the first token of its stream.",
        [({}, figures.first_token)],
    )
    yield from _histogram(
        "burnish_gateway_overhead_seconds",
        "The part of a completed answer's duration in which no engine worked on it.",
        [({}, figures.overhead)],
    )
    yield from _family(
        "burnish_prompt_tokens_total",
        "counter",
        "Prompt tokens of completed answers.",
        figures.prompt_tokens.samples(),
    )
    yield from _family(
        "burnish_completion_tokens_total",
        "counter",
        "Completion tokens of completed answers.",
        figures.completion_tokens.samples(),
    )
    yield from _family(
        "burnish_judgements_total",
        "counter",
        "Judgements by kind and source.",
        figures.judgements.samples(),
    )
    yield from _family(
        "burnish_not_recorded_total",
        "counter",
        "Requests refused and answers withheld because their row was not committed in time.",
        figures.not_recorded.samples() or [({}, 0)],
    )
    yield from _family(
        "burnish_connections_ended_total",
        "counter",
        "Connections that the gateway ended or refused to keep within its bounds.",
        figures.connections_ended.samples(),
    )


def _family(
    name: str, kind: Literal["counter", "gauge"], meaning: str, samples: Iterable[Sample]
) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inner = _written(labels)
        yield f"{name}{{{inner}}} {value}" if inner else f"{name} {value}"


def _histogram(
    name: str, meaning: str, parts: Iterable[tuple[Mapping[str, str], Histogram]]
) -> Iterator[str]:
    """Histograms, each with labels beside its own; bounds are cumulative and end with +Inf."""
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} histogram"
    for more, histogram in parts:
        for labels, counts, total in histogram.series():
            inner, below = _written({**labels, **more}), 0
            for bound, count in zip((*histogram.bounds, "+Inf"), counts, strict=True):
                below += count
                yield f'{name}_bucket{{{inner},le="{bound}"}} {below}'
            yield f"{name}_sum{{{inner}}} {total}"
            yield f"{name}_count{{{inner}}} {below}"


def _written(labels: Mapping[str, str]) -> str:
    return ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
