"""The gateway's figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from server.metrics import MOST_HISTOGRAMS, MOST_SERIES, Figures
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
    gateway.recorder._before = (7, 2)
    gateway.figures.integrity_errors.inc(3)
    reply = sqlite_gateway.client().get("/metrics")
    figures = _read(reply.text)

    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert figures["burnish_recorder_rows_committed_total"] == 7
    assert figures["burnish_recorder_rows_lost_total"] == 2
    assert figures["burnish_integrity_errors_total"] == 3
    assert figures["burnish_gateway_leading"] == 1
    assert figures['burnish_engines{state="ready"}'] == 1
    assert figures['burnish_engines{state="failed"}'] == 0
    assert figures['burnish_engine_running_requests{engine="engine-0"}'] == 0
    production = 'burnish_deployment_generation{deployment="assistant",production="assistant@0"}'
    assert figures[production] == 0


def test_large_counts_are_written_in_full(sqlite_gateway: RunningGateway) -> None:
    sqlite_gateway.gateway.recorder._before = (123_456_789, 0)
    figures = _read(sqlite_gateway.client().get("/metrics").text)
    assert figures["burnish_recorder_rows_committed_total"] == 123_456_789


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
    arm, release = 'arm="production"', 'release="assistant@0"'
    labels = f"{{{arm},{release}}}"
    for kind in ("plain", "streamed"):
        duration = f'{{{arm},kind="{kind}",le="+Inf",{release}}}'
        assert figures[f"burnish_request_duration_seconds_bucket{duration}"] == 1
        total = f'{{{arm},kind="{kind}",{release}}}'
        assert 0 < figures[f"burnish_request_duration_seconds_sum{total}"] < 30
    assert figures[f"burnish_time_to_first_token_seconds_count{labels}"] == 1
    assert figures[f"burnish_gateway_overhead_seconds_count{labels}"] == 2
    assert 0 < figures[f"burnish_gateway_overhead_seconds_sum{labels}"] < 30
    assert figures[f'burnish_answers_total{{{arm},{release},status="complete"}}'] == 2
    usage = answer["usage"]
    assert figures[f"burnish_prompt_tokens_total{labels}"] == 2 * usage["prompt_tokens"]
    assert figures[f"burnish_completion_tokens_total{labels}"] == 2 * usage["completion_tokens"]
    assert figures['burnish_judgements_total{kind="rating",source="human"}'] == 1
    assert figures["burnish_not_recorded_total"] == 0


def test_figures_hold_a_bounded_number_of_series() -> None:
    figures = Figures()
    for number in range(MOST_SERIES + 5):
        release = figures.of_release(f"assistant@{number}", "pinned")
        release.prompt_tokens.inc()
        release.duration["plain"].observe(1.5)
    found = _read(generate_latest(figures.registry).decode())
    plain = re.compile('burnish_request_duration_seconds_count{.*kind="plain"')
    tokens = {name: value for name, value in found.items() if "prompt_tokens" in name}
    assert len(tokens) == MOST_SERIES + 1
    assert tokens['burnish_prompt_tokens_total{arm="other",release="other"}'] == 5
    durations = {name: value for name, value in found.items() if plain.match(name)}
    assert len(durations) == MOST_HISTOGRAMS + 1
    rest = 'burnish_request_duration_seconds_count{arm="other",kind="plain",release="other"}'
    assert durations[rest] == MOST_SERIES + 5 - MOST_HISTOGRAMS


def test_figures_are_kept_in_memory_whatever_vllm_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    count = "from server.metrics import Figures; Figures().not_recorded.inc()"
    subprocess.run([sys.executable, "-P", "-c", count], check=True)
    assert list(tmp_path.iterdir()) == []


def test_what_should_stay_0_is_there_from_the_start(sqlite_gateway: RunningGateway) -> None:
    figures = _read(sqlite_gateway.client().get("/metrics").text)
    for name in (
        "burnish_not_recorded_total",
        "burnish_recorder_rows_lost_total",
        "burnish_recorder_queue_rows",
        "burnish_integrity_errors_total",
    ):
        assert figures[name] == 0


def test_no_label_names_a_person_or_repeats_what_was_said(sqlite_gateway: RunningGateway) -> None:
    secret = "ochre"
    client = sqlite_gateway.client(sqlite_gateway.key(f"{secret}-user", "chat", "feedback"))
    message = {"role": "user", "content": secret}
    body = {"model": "assistant", "messages": [message], "user": secret, "metadata": {"a": secret}}
    answer = client.post("/v1/chat/completions", json=body).json()
    client.post("/v1/chat/completions", json={**body, "model": secret})
    client.get(f"/{secret}")
    verdict = {"completion_id": answer["id"], "kind": "signal", "name": secret, "value": secret}
    assert client.post("/v1/feedback", json=verdict).status_code == 201
    text = sqlite_gateway.client().get("/metrics").text
    assert 'burnish_judgements_total{kind="signal",source="human"} 1' in text
    assert secret not in text
    labels = set(re.findall(r'[{,]([a-z_]+)="', text))
    assert labels <= {
        "route", "status", "release", "arm", "kind", "source", "le", "engine", "state",
        "deployment", "production",
    }  # fmt: skip


def test_the_dashboard_shows_figures_that_exist_and_leaves_none_out(
    sqlite_gateway: RunningGateway,
) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    shown = {name.removesuffix("_bucket") for name in re.findall(r"burnish_[a-z_]+", queries)}
    text = sqlite_gateway.client().get("/metrics").text
    declared = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert shown == declared - {"burnish_gateway_stopping"}


def test_a_key_that_is_limited_to_deployments_does_not_read_them(
    sqlite_gateway: RunningGateway,
) -> None:
    limited = sqlite_gateway.client(sqlite_gateway.key("bo", "admin", deployments=["assistant"]))
    reply = limited.get("/metrics")
    assert reply.status_code == 403
    assert "limited to assistant" in reply.json()["error"]["message"]
