"""What the gateway counts: names, meanings, labels, and how many series there may be.

Owns: the counters and histograms that the hot path bumps, in a registry of each gateway's own. No
label names a person or repeats what was said, and a counter keeps `MOST_SERIES` combinations of
labels, a histogram `MOST_HISTOGRAMS`: what comes after them counts as `other`. Does not own: what
is read from the gateway's state when it is asked, and the reply (`endpoints/metrics.py`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    values,
)

# Beside every figure the library would show the moment at which it began, as a series of its own.
disable_created_metrics()  # type: ignore[no-untyped-call]
# Figures in files, which PROMETHEUS_MULTIPROC_DIR asks for, are for processes that share a port, as
# a vLLM may have them. A gateway that is started with that variable counts in memory all the same.
values.ValueClass = values.MutexValue

MOST_SERIES = 200
MOST_REQUEST_SERIES = 2_000  #: routes are ours and known, and so are statuses
MOST_HISTOGRAMS = 50  #: each is some twenty lines
OTHER = "other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_OVERHEAD_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_WHOSE = ("release", "arm")


Metric = TypeVar("Metric", Counter, Histogram)


class Series(Generic[Metric]):
    """A metric's figures by the values of its labels, kept at hand; `most` of them and `other`.

    `fixed` are the values of the last labels. Any thread may ask.
    """

    def __init__(self, metric: Metric, *fixed: str, most: int = MOST_SERIES) -> None:
        self._metric: Metric = metric
        self._fixed = fixed
        self._most = most
        self._found: dict[tuple[str, ...], Metric] = {}
        self._lock = threading.Lock()

    def of(self, *labels: str) -> Metric:
        """The figure to bump."""
        found = self._found.get(labels)
        return self._add(labels) if found is None else found

    def _add(self, labels: tuple[str, ...]) -> Metric:
        with self._lock:
            if labels not in self._found and len(self._found) >= self._most:
                labels = (OTHER,) * len(labels)
            return self._found.setdefault(labels, self._metric.labels(*labels, *self._fixed))


@dataclass(frozen=True, slots=True)
class ReleaseFigures:
    """What is counted of completed answers of one release and arm."""

    duration: dict[str, Histogram]  #: by kind: `plain` and `streamed`
    first_token: Histogram
    overhead: Histogram
    prompt_tokens: Counter
    completion_tokens: Counter


class Figures:
    """What the hot path counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._count(
            "burnish_requests_total",
            "Replies by route and HTTP status.",
            "route",
            "status",
            most=MOST_REQUEST_SERIES,
        )
        self.answers = self._count(
            "burnish_answers_total",
            "Chat and text completions that an engine was asked for, by what became of them.",
            *_WHOSE,
            "status",
        )
        duration = Histogram(
            "burnish_request_duration_seconds",
            "From a request's body to the end of its answer, chat and text completions.",
            (*_WHOSE, "kind"),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._duration = {
            kind: Series(duration, kind, most=MOST_HISTOGRAMS) for kind in ("plain", "streamed")
        }
        self._first_token = self._measure(
            "burnish_time_to_first_token_seconds",
            "From a request's body to the first token of its stream.",
            _SECONDS,
        )
        self._overhead = self._measure(
            "burnish_gateway_overhead_seconds",
            "The part of a completed answer's duration in which no engine worked on it.",
            _OVERHEAD_SECONDS,
        )
        self._prompt_tokens = self._count(
            "burnish_prompt_tokens_total", "Prompt tokens of completed answers.", *_WHOSE
        )
        self._completion_tokens = self._count(
            "burnish_completion_tokens_total", "Completion tokens of completed answers.", *_WHOSE
        )
        self.judgements = self._count(
            "burnish_judgements_total", "Judgements by kind and source.", "kind", "source"
        )
        self.not_recorded = Counter(
            "burnish_not_recorded_total",
            "Requests refused and answers withheld because their row was not committed in time.",
            registry=self.registry,
        )
        self.integrity_errors = Counter(
            "burnish_integrity_errors_total",
            "Answers of an engine under another name than it was asked for.",
            registry=self.registry,
        )
        self.connections_ended = self._count(
            "burnish_connections_ended_total",
            "Connections that the gateway ended or refused to keep within its bounds.",
            "reason",
        )
        self._releases: dict[tuple[str, str], ReleaseFigures] = {}

    def of_release(self, release: str, arm: str) -> ReleaseFigures:
        """The figures of one release and arm. The event loop alone asks."""
        found = self._releases.get((release, arm))
        if found is None:
            found = ReleaseFigures(
                duration={kind: series.of(release, arm) for kind, series in self._duration.items()},
                first_token=self._first_token.of(release, arm),
                overhead=self._overhead.of(release, arm),
                prompt_tokens=self._prompt_tokens.of(release, arm),
                completion_tokens=self._completion_tokens.of(release, arm),
            )
            if len(self._releases) < MOST_SERIES:
                self._releases[release, arm] = found
        return found

    def _count(
        self, name: str, meaning: str, *labels: str, most: int = MOST_SERIES
    ) -> Series[Counter]:
        return Series(Counter(name, meaning, labels, registry=self.registry), most=most)

    def _measure(self, name: str, meaning: str, bounds: tuple[float, ...]) -> Series[Histogram]:
        metric = Histogram(name, meaning, _WHOSE, registry=self.registry, buckets=bounds)
        return Series(metric, most=MOST_HISTOGRAMS)
