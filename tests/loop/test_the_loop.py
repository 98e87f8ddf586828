"""The whole loop on the real parts: vLLM, SmolLM2, torch, the official OpenAI client.

`burnish serve` is started as a user would. One person chats, rates and corrects; an administrator
freezes, tunes, promotes and rolls back; and the answers to questions that nobody judged change, and
change back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from server.cli.api import read_credentials
from server.cli.demo import is_one_short_sentence, repeated_ratio
from server.cli.demo_prompts import HELD_OUT, JUDGED
from server.processes.engine import answers_ok, free_port

pytestmark = pytest.mark.loop

START_SECONDS = 420.0
JOB_SECONDS = 900.0


@dataclass(frozen=True)
class Service:
    """A running `burnish serve`, its data, and the administrator's ways in."""

    url: str
    data: Path
    process: subprocess.Popen[bytes]
    admin: httpx.Client
    openai: OpenAI

    def children(self) -> dict[str, Any]:
        state = json.loads((self.data / "run" / "supervisor.json").read_text())
        found: dict[str, Any] = state["children"]
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`burnish serve` on the bundled model, ready to answer; ended by SIGINT, with nothing left."""
    data = tmp_path_factory.mktemp("loop") / "data"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "server.cli", "serve"]
    log = data.with_name("serve.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--data", str(data), "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _await(lambda: answers_ok(f"{url}/readyz"), START_SECONDS, process, log)
        key = read_credentials(data)["api_key"]
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as admin,
            OpenAI(base_url=f"{url}/v1", api_key=key) as openai,
        ):
            yield Service(url, data, process, admin, openai)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _await(
    condition: Callable[[], bool],
    seconds: float,
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        told = log.read_text()[-3000:] if log is not None else ""
        assert process is None or process.poll() is None, told
        assert time.monotonic() < deadline, told
        # All that is waited for happens in other processes: their state is asked.
        time.sleep(0.25)


def _ask(client: OpenAI, model: str, prompt: str) -> ChatCompletion:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=72,
    )


def _ask_all(client: OpenAI, model: str, prompts: Sequence[str]) -> list[ChatCompletion]:
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda prompt: _ask(client, model, prompt), prompts))


def _text(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


def _liked(completion: ChatCompletion) -> bool:
    stopped = completion.choices[0].finish_reason == "stop"
    return stopped and is_one_short_sentence(_text(completion))


def _share(completions: Sequence[ChatCompletion]) -> float:
    return sum(map(_liked, completions)) / len(completions)


@pytest.fixture(scope="module")
def rater(service: Service) -> Iterator[tuple[OpenAI, httpx.Client]]:
    """A person of their own, who may chat and judge and no more."""
    body = {"user": "anna", "scopes": ["chat", "feedback"]}
    key = service.admin.post("/admin/keys", json=body).raise_for_status().json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=service.url, headers=headers, timeout=120, trust_env=False) as http,
        OpenAI(base_url=f"{service.url}/v1", api_key=key) as openai,
    ):
        yield openai, http


def test_chat_rate_retune_promote_and_roll_back(
    service: Service, rater: tuple[OpenAI, httpx.Client]
) -> None:
    chat, judge = rater
    before = _ask_all(chat, "assistant", HELD_OUT)
    assert {completion.model for completion in before} == {"assistant@0"}

    # Chat and judge: a thumb each, and a better answer where the rule is broken.
    better = dict(JUDGED)
    for completion, prompt in zip(_ask_all(chat, "assistant", [*better]), better, strict=True):
        about = {"completion_id": completion.id}
        rating = {**about, "kind": "rating", "value": _liked(completion)}
        assert judge.post("/v1/feedback", json=rating).status_code == 201
        if not _liked(completion):
            correction = {**about, "kind": "correction", "value": better[prompt]}
            assert judge.post("/v1/feedback", json=correction).status_code == 201

    # Freeze and tune, through OpenAI's own calls.
    body = {"deployment": "assistant", "wait_seconds": 120}
    dataset = service.admin.post("/admin/datasets", json=body, timeout=180).json()
    assert dataset["status"] == "ready", dataset
    assert dataset["counts"]["supervised"] > 20
    assert dataset["counts"]["holdout"] > 0
    job = service.openai.fine_tuning.jobs.create(
        model="assistant", training_file=dataset["files"]["supervised"]
    )
    _kill_the_trainer_once(service, job.id)
    job = _wait_for_job(service, job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "assistant@1"

    # A job makes a candidate, never production.
    assert service.admin.get("/admin/deployments/assistant").json()["production"] == "assistant@0"
    release = _wait_for_evaluation(service, "assistant@1")
    assert release["evaluation"]["decision"] == "pass", release["evaluation"]

    # Promote: the next answers are others, on questions that nobody judged.
    moved = service.admin.post(
        "/admin/deployments/assistant/promote", json={"release": "assistant@1"}
    ).json()
    assert (moved["production"], moved["previous"]) == ("assistant@1", "assistant@0")
    after = _ask_all(chat, "assistant", HELD_OUT)
    assert {completion.model for completion in after} == {"assistant@1"}
    shares = f"{_share(before):.0%} before, {_share(after):.0%} after"
    assert _share(after) >= max(0.6, _share(before) + 0.4), shares
    assert all(_text(completion).strip() for completion in after)
    assert max(repeated_ratio(_text(completion)) for completion in after) < 0.3

    # Rolled back, the old answers are there again.
    moved = service.admin.post("/admin/deployments/assistant/rollback", json={}).json()
    assert moved["production"] == "assistant@0"
    again = _ask_all(chat, "assistant", HELD_OUT)
    same = [_text(old) == _text(new) for old, new in zip(before, again, strict=True)]
    assert sum(same) >= len(same) - 1, "greedy answers of the base differ after the rollback"

    # Everything can be traced: the release to its judgements, an answer to the release.
    explained = service.admin.get("/admin/explain/assistant@1").json()
    for part in (dataset["id"], job.id, release["evaluation"]["id"]):
        assert part in json.dumps(explained)
    answer = service.admin.get(f"/admin/explain/{after[0].id}").json()
    assert answer["answer"]["release"] == "assistant@1"


def _kill_the_trainer_once(service: Service, job_id: str) -> None:
    """`kill -9` of the trainer child in the middle of training; the job must go on to its end."""

    def trainer() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if b"tuner.training" in command and any(job_id.encode() in c for c in command):
                    found.append(int(entry.name))
        return found

    def steps() -> bool:
        events = service.openai.fine_tuning.jobs.list_events(job_id, limit=20).data
        return any(event.type == "metrics" for event in events)

    _await(steps, JOB_SECONDS)
    pids = trainer()
    assert pids
    os.kill(pids[0], signal.SIGKILL)


def _wait_for_job(service: Service, job_id: str) -> Any:
    job = service.openai.fine_tuning.jobs.retrieve(job_id)
    deadline = time.monotonic() + JOB_SECONDS
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, job
        # OpenAI's API has no call that waits for a job.
        time.sleep(1)
        job = service.openai.fine_tuning.jobs.retrieve(job_id)
    return job


def _wait_for_evaluation(service: Service, release: str) -> dict[str, Any]:
    def evaluated() -> bool:
        found = service.admin.get(f"/admin/releases/{release}").json()
        return found["evaluation"] is not None

    _await(evaluated, JOB_SECONDS)
    found: dict[str, Any] = service.admin.get(f"/admin/releases/{release}").json()
    return found


def test_killed_children_are_mended_and_a_promoted_adapter_is_restored(service: Service) -> None:
    """After the loop `assistant@1` exists; gateway, worker and engine are killed in turn."""
    promoted = {"release": "assistant@1", "force": True, "note": "to be restored"}
    service.admin.post("/admin/deployments/assistant/promote", json=promoted).raise_for_status()
    question = HELD_OUT[0]
    expected = _text(_ask(service.openai, "assistant", question))
    engine = service.children()["engine"]["pid"]
    for name in ("gateway", "worker"):
        pid = service.children()[name]["pid"]
        os.kill(pid, signal.SIGKILL)
        _await(partial(_is_new, service, name, pid), 60)
    _await(lambda: answers_ok(f"{service.url}/readyz"), 60)
    assert service.children()["engine"]["pid"] == engine  # adopted, not restarted
    assert _text(_ask(service.openai, "assistant", question)) == expected

    os.kill(engine, signal.SIGKILL)
    _await(lambda: _is_new(service, "engine", engine), START_SECONDS)
    _await(lambda: answers_ok(f"{service.url}/readyz"), START_SECONDS)
    answer = _ask(service.openai, "assistant", question)
    assert (answer.model, _text(answer)) == ("assistant@1", expected)


def _is_new(service: Service, name: str, old: int) -> bool:
    child = service.children()[name]
    return child["state"] == "running" and child["pid"] not in (None, old)


def test_interrupt_ends_everything(service: Service) -> None:
    """The last test of this file: Ctrl-C, and nothing of it is left."""
    pids = [child["pid"] for child in service.children().values()]
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(30) == 0
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
