"""The whole product, as it is run, for a benchmark: `burnish serve` and its official API.

One data directory is one deployment's life. It is kept, so that a run goes on where the last one
ended; within it production is the base between two cells.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.cli.api import Api, ApiError, NoConnection, read_credentials
from server.processes.engine import answers_ok, free_port

DEPLOYMENT = "assistant"
BASE = f"{DEPLOYMENT}@0"
SYSTEM = "Answer in two or three sentences."  #: in every request, as an application would send it
MAX_TOKENS = 192
THREADS = 16  #: what the engine answers at once without a GPU
BLOCK = 32  #: answers that are asked for before what came is written down
START_SECONDS = 900.0
ENDED = ("succeeded", "failed", "cancelled", "paused")


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer as its person got it."""

    id: str
    model: str
    text: str


@contextmanager
def service(data: Path, model: Path) -> Iterator[Api]:
    """`burnish serve` of this model with this data directory, once it is ready."""
    data.mkdir(parents=True, exist_ok=True)
    log, url = data / "serve.log", f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-P", "-m", "server.cli", "serve", "--data", str(data)]
    command += ["--model", str(model), "--port", str(port)]
    environment = {  # how the engine runs is the machine's business; all else is as by default
        name: value
        for name, value in os.environ.items()
        if not name.startswith("BURNISH_") or name.startswith("BURNISH_ENGINE__")
    }
    with log.open("ab") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers_ok(f"{url}/readyz"):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"burnish serve does not start: {log.read_text().splitlines()[-3:]}"
                )
            # Other processes start: there is nothing to wait on but the port.
            time.sleep(0.5)
        api = Api(url, read_credentials(data)["api_key"])
        try:
            yield api
        finally:
            api.close()
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        try:
            child.wait(120)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def messages(prompt: str) -> list[dict[str, str]]:
    """A request's turns."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]


def ask(api: Api, model: str, prompt: str, **options: Any) -> Asked:
    """One answer of `model`; greedy unless the options say otherwise."""
    body = {
        "model": model,
        "messages": messages(prompt),
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        **options,
    }
    reply = api.post("/v1/chat/completions", body)
    return Asked(reply["id"], reply["model"], reply["choices"][0]["message"]["content"] or "")


def in_parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`work` of every item, in order; as many at once as an engine likes to have."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


def ask_greedily(api: Api, model: str, prompts: Sequence[str]) -> list[Asked]:
    return in_parallel(lambda prompt: ask(api, model, prompt), prompts)


def crowd_key(api: Api, data: Path) -> Api:
    """The application's key that speaks for the crowd; made once, kept beside the data."""
    kept = data / "crowd.json"
    if not kept.exists():
        made = {"user": "crowd", "scopes": ["chat", "feedback"], "end_users": True}
        kept.write_text(json.dumps({"key": api.post("/admin/keys", made)["key"]}))
    return Api(api.url, json.loads(kept.read_text())["key"])


def until(find: Callable[[], Any]) -> Any:
    """What `find` returns, once it is something; a gateway that is away is asked again."""
    while True:
        try:
            if found := find():
                return found
        except NoConnection:
            pass
        except ApiError as error:
            if error.status != 503:
                raise
        # The work is another process's, and the API has no call that waits for it.
        time.sleep(1.0)


def freeze(api: Api) -> dict[str, Any]:
    """A data set of all that was said so far."""
    made = api.post("/admin/datasets", {"deployment": DEPLOYMENT, "wait_seconds": 30})

    def frozen() -> Any:
        found = api.get(f"/admin/datasets/{made['id']}")
        return found if found["status"] in ("ready", "failed") else None

    found: dict[str, Any] = until(frozen)
    if found["status"] == "failed":
        raise RuntimeError(f"no data set: {found['error']}")
    return found


def tune(api: Api, dataset: str, method: str, settings: dict[str, Any], seed: int) -> Any:
    """A tuning job on a data set, when it has ended."""
    body = {
        "model": DEPLOYMENT,
        "training_file": dataset,
        "seed": seed,
        "method": {"type": method, method: {"hyperparameters": settings}},
    }
    made = api.post("/v1/fine_tuning/jobs", body)

    def ended() -> Any:
        job = api.get(f"/v1/fine_tuning/jobs/{made['id']}")
        return job if job["status"] in ENDED else None

    return until(ended)


def evaluate(api: Api, job: str) -> dict[str, Any]:
    """The evaluation that follows a job, when it has decided."""
    evaluation = api.get(f"/admin/jobs/{job}")["result"]["evaluation_id"]

    def decided() -> Any:
        found = api.get(f"/admin/evaluations/{evaluation}")
        return found if found["decision"] is not None or found["error"] else None

    found: dict[str, Any] = until(decided)
    return found


def promote(api: Api, release: str) -> None:
    """Make `release` production, whatever the gate says."""
    if api.get(f"/admin/deployments/{DEPLOYMENT}")["production"] != release:
        body = {"release": release, "force": True, "note": "learning benchmark"}
        api.post(f"/admin/deployments/{DEPLOYMENT}/promote", body)
