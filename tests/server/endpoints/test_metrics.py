"""The gateway's figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

from server.metrics import MOST_SERIES, Counter
from tests.gateway_fixtures import RunningGateway

DASHBOARD = Path(__file__).resolve().parents[3] / "docs/grafana/burnish.json"
MESSAGE = {"role": "user", "content": "What is a river?"}
SAMPLE = re.compile(r'([a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*\})? (\S+)')


def _read(text: str) -> dict[str, float]:
    """Samples by name and labels; every line is well-formed, every family is declared once."""
    found: dict[str, float] = {}
    declared: list[str] = []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            declared.append(line.split()[2])
        elif not line.startswith("# HELP "):
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            assert re.sub("_(bucket|sum|count)$", "", sample[1]) == declared[-1]
            found[sample[1] + (sample[2] or "")] = float(sample[3])
    assert len(declared) == len(set(declared))
    return found


def test_figures_are_those_of_the_gateway(sqlite_gateway: RunningGateway) -> None:
    gateway = sqlite_gateway.gateway
    gateway.recorder.committed, gateway.recorder.lost = 7, 2
    gateway.fleet.integrity_errors = 3
    reply = sqlite_gateway.client().get("/metrics")
    figures = _read(reply.text)

    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert figures["burnish_recorder_rows_committed_total"] == 7
    assert figures["burnish_recorder_rows_lost_total"] == 2
    assert figures["burnish_integrity_errors_total"] == 3
    assert figures['burnish_engines{state="ready"}'] == 1
    assert figures['burnish_engines{state="failed"}'] == 0
    assert figures['burnish_engine_running_requests{engine="engine-0"}'] == 0
    production = 'burnish_deployment_generation{deployment="assistant",production="assistant@0"}'
    assert figures[production] == 0


def test_large_counts_are_written_in_full(sqlite_gateway: RunningGateway) -> None:
    sqlite_gateway.gateway.recorder.committed = 123_456_789
    text = sqlite_gateway.client().get("/metrics").text
    assert "\nburnish_recorder_rows_committed_total 123456789\n" in text


def test_what_was_asked_answered_and_judged_is_counted(sqlite_gateway: RunningGateway) -> None:
    client, body = sqlite_gateway.client(), {"model": "assistant", "messages": [MESSAGE]}
    answer = client.post("/v1/chat/completions", json=body).json()
    client.post("/v1/chat/completions", json={**body, "stream": True})
    client.post("/v1/chat/completions", json={"model": "nobody's", "messages": [MESSAGE]})
    client.get("/nowhere")
    verdict = {"completion_id": answer["id"], "kind": "rating", "value": True}
    client.post("/v1/feedback", json=verdict)
    figures = _read(client.get("/metrics").text)

    def requests(route: str, status: int) -> float:
        return figures[f'burnish_requests_total{{route="{route}",status="{status}"}}']

    assert requests("/v1/chat/completions", 200) == 2
    assert requests("/v1/chat/completions", 404) == 1
    assert requests("other", 404) == 1
    assert requests("/v1/feedback", 201) == 1
    for kind in ("plain", "streamed"):
        duration = f'burnish_request_duration_seconds_bucket{{kind="{kind}",le="+Inf"}}'
        assert figures[duration] == 1
        assert 0 < figures[f'burnish_request_duration_seconds_sum{{kind="{kind}"}}'] < 30
    assert figures["burnish_time_to_first_token_seconds_count"] == 1
    assert figures["burnish_gateway_overhead_seconds_count"] == 2
    assert 0 < figures["burnish_gateway_overhead_seconds_sum"] < 30
    labels = '{release="assistant@0",arm="production"}'
    usage = answer["usage"]
    assert figures[f"burnish_prompt_tokens_total{labels}"] == 2 * usage["prompt_tokens"]
    assert figures[f"burnish_completion_tokens_total{labels}"] == 2 * usage["completion_tokens"]
    assert figures['burnish_judgements_total{kind="rating",source="human"}'] == 1
    assert figures["burnish_not_recorded_total"] == 0


def test_a_counter_holds_a_bounded_number_of_series() -> None:
    counter = Counter("release")
    for number in range(MOST_SERIES + 5):
        counter.add(f"assistant@{number}")
    figures = {labels["release"]: value for labels, value in counter.samples()}
    assert len(figures) == MOST_SERIES + 1
    assert figures["other"] == 5


def test_the_dashboard_shows_figures_that_exist_and_leaves_none_out(
    sqlite_gateway: RunningGateway,
) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    shown = {name.removesuffix("_bucket") for name in re.findall(r"burnish_[a-z_]+", queries)}
    text = sqlite_gateway.client().get("/metrics").text
    declared = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert shown == declared - {"burnish_gateway_stopping"}
