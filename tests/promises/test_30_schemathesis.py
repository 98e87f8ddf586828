"""Promise 30: Schemathesis over `/openapi.json` finds no 5xx, and every response conforms.

The gateway is a whole one over the fake engine, asked with an administrator's key. First each
operation is asked for what it is there for, so that every reply of success is compared with its
schema; then Schemathesis makes up requests of its own, with and without ids of what is there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis import checks

from feedback import datasets
from feedback.db import Database
from server.access.scopes import ROUTES
from server.endpoints.files import PURPOSE
from tests.everything import add_everything
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled
from tests.rows import add_candidate
from tuner import jobs
from tuner.tables import JobKind

pytestmark = pytest.mark.promises

Operation = tuple[str, str]
Ids = dict[str, str]
JSON = "application/json"

CONFIGURATION = """
[checks]
# Rules between fields (a rating is true or false, a promotion needs its evaluation) stand in no
# schema: a body that fits it may be refused, and that reply has to conform.
positive_data_acceptance.enabled = false

[[operations]]
# It may be asked to revoke what dictionaries name, never the key that all of this is asked with.
include-name = "DELETE /admin/keys/{key_id}"
phases.stateful.enabled = false
phases.examples.extra-data-sources.responses = false
phases.coverage.extra-data-sources.responses = false
phases.fuzzing.extra-data-sources.responses = false
"""
#: Fields of bodies, and the dictionary that has values for them.
IN_BODIES = {
    "model": "model",
    "training_file": "file_id",
    "release": "release",
    "baseline": "release",
    "deployment": "deployment",
    "deployments[*]": "deployment",
    "completion_id": "completion_id",
    "conversation_id": "conversation_id",
    "completion_ids[*]": "completion_id",
}
#: Work that nobody does here would be waited for.
NO_WAIT = '"body.wait_seconds" = { dictionary = "no_wait", probability = 1.0 }'

CONFORMANCE = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
HELLO = {"model": "assistant", "messages": [{"role": "user", "content": "Hello"}]}
LINE = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}
UPLOAD = "".join(json.dumps(LINE) + "\n" for _ in range(12)).encode()

#: What each operation is asked for. A body of several requests in a row is a list.
BODIES: dict[Operation, Callable[[Ids], list[dict[str, Any]]]] = {
    ("POST", "/v1/chat/completions"): lambda ids: [
        HELLO,
        {**HELLO, "n": 2, "logprobs": True, "model": ids["deployment"]},
        {**HELLO, "stream": True},
    ],
    ("POST", "/v1/completions"): lambda _: [
        {"model": "assistant", "prompt": "Hello"},
        {"model": "assistant", "prompt": "Hello", "stream": True},
    ],
    ("POST", "/v1/chat/completions/{completion_id}"): lambda _: [{"metadata": {"a": "b"}}],
    ("POST", "/v1/feedback"): lambda ids: [
        {"completion_id": ids["other_id"], "kind": kind, "value": value}
        for kind, value in (
            ("rating", True),
            ("rating", True),
            ("stars", 4),
            ("comment", "Good."),
            ("correction", "A wading bird."),
            ("comment", None),
        )
    ],
    ("POST", "/v1/feedback/tokens"): lambda ids: [
        {"completion_id": ids["other_id"], "expires_in_seconds": 60}
    ],
    ("POST", "/v1/comparisons"): lambda ids: [
        {"completion_ids": [ids["completion_id"], ids["other_id"]], "preferred": preferred}
        for preferred in ("a", "a", None)
    ],
    ("POST", "/v1/files"): lambda _: [
        {"file": ("rows.jsonl", UPLOAD, "application/jsonl"), "purpose": PURPOSE}
    ],
    ("POST", "/v1/fine_tuning/jobs"): lambda ids: [
        {"model": ids["deployment"], "training_file": ids["dataset_id"], "metadata": {"a": "b"}}
    ],
    ("POST", "/admin/deployments"): lambda _: [{"name": "new", "aliases": ["fresh"]}],
    ("PATCH", "/admin/deployments/{name}"): lambda _: [{"system_prompt": "Be brief."}],
    ("POST", "/admin/deployments/{name}/promote"): lambda ids: [
        {"release": ids["without_adapter"], "force": True, "note": "for a test"}
    ],
    ("POST", "/admin/datasets"): lambda ids: [
        {"deployment": ids["deployment"]},
        {"deployment": ids["deployment"], "wait_seconds": 0},
    ],
    ("POST", "/admin/evaluations"): lambda ids: [{"release": ids["without_adapter"]}],
    ("POST", "/admin/keys"): lambda ids: [
        {
            "user": "dora",
            "scopes": ["chat"],
            "deployments": [ids["deployment"]],
            "limits": {"requests_per_minute": 5},
        }
    ],
}
#: These come last, in this order: afterwards what they name is another, or gone.
LAST: tuple[Operation, ...] = (
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/admin/deployments/{name}/promote"),
    ("POST", "/admin/deployments/{name}/rollback"),
    ("POST", "/admin/releases/{name}/discard"),
    ("DELETE", "/v1/files/{file_id}"),
    ("DELETE", "/v1/feedback/{judgement_id}"),
    ("DELETE", "/v1/chat/completions/{completion_id}"),
    ("DELETE", "/admin/keys/{key_id}"),
)


def test_every_operation_succeeds_and_its_reply_conforms(
    sqlite_gateway: RunningGateway, figures: Figures
) -> None:
    sqlite_gateway.set_capacity(64)  # adapter slots: for one more deployment
    ids = add_everything(sqlite_gateway, "poet", "bea")
    add_candidate(sqlite_gateway.database, "poet", system_prompt="Once.")
    ids["without_adapter"] = add_candidate(sqlite_gateway.database, "poet")
    schema = schemathesis.openapi.from_url(f"{sqlite_gateway.url}/openapi.json")
    operations = {
        (found.ok().method.upper(), found.ok().path): found.ok()
        for found in schema.get_all_operations()
    }
    assert BODIES.keys() <= operations.keys()
    assert set(LAST) <= operations.keys()
    order = [name for name in operations if name not in LAST] + list(LAST)
    asked = 0
    with freezing(sqlite_gateway):
        for method, path in order:
            given = {**ids, "name": ids["release"]} if path.startswith("/admin/releases") else ids
            if path == "/v1/files/{file_id}" and method == "DELETE":
                given = {**ids, "file_id": _upload(sqlite_gateway.client())}
            operation = operations[method, path]
            names = [parameter.name for parameter in operation.path_parameters]
            build = BODIES.get((method, path), lambda _: [{}])
            for body in build(ids):
                case = operation.Case(path_parameters={name: given[name] for name in names})
                options: dict[str, Any] = {}
                if path == "/v1/files" and method == "POST":
                    options = {"files": {"file": body["file"]}, "data": {"purpose": PURPOSE}}
                elif body:
                    case.body, case.media_type = body, JSON
                key = {"authorization": f"Bearer {sqlite_gateway.admin_key}"}
                reply = case.call(headers=key, **options)
                assert reply.status_code < 300, (method, path, reply.text)
                case.validate_response(reply, checks=CONFORMANCE)
                asked += 1
    figures(operations=len(order), replies_of_success=asked, not_conforming=0)


def test_made_up_requests_meet_no_fault_and_every_response_conforms(
    sqlite_gateway: RunningGateway, tmp_path: Path, figures: Figures
) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(_configure(sqlite_gateway))
    command = [sys.executable, "-P", "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"{sqlite_gateway.url}/openapi.json", "--seed", "30", "--request-timeout", "60"]
    command += ["--max-examples", str(scaled(200))]
    with freezing(sqlite_gateway):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    replies = sqlite_gateway.count("burnish_requests")
    routes = {path for _, path in ROUTES if not path.startswith("/internal")}
    succeeded = {labels["route"] for labels, _ in replies if labels["status"] < "300"}
    assert len(routes - succeeded) <= len(routes) // 10, routes - succeeded
    statuses = Counter({labels["status"]: 0 for labels, _ in replies})
    for labels, count in replies:
        statuses[labels["status"]] += count
    assert not [status for status in statuses if status >= "500"]
    figures(made_up_requests=statuses.total(), by_status=str(dict(sorted(statuses.items()))))


def _configure(running: RunningGateway) -> str:
    ids: dict[str, list[str]] = defaultdict(list)
    for user in ("anna", "bea", "carl"):
        for name, value in add_everything(running, f"of-{user}", user).items():
            ids["completion_id" if name == "other_id" else name].append(value)
    ids["model"] += [*ids["release"], "assistant", "tiny"]
    ids["file_id"] += ids["dataset_id"]
    ids["name"] += ids["release"]
    places = {**{name: name for name in ids}, **{f"body.{p}": d for p, d in IN_BODIES.items()}}
    lines = [CONFIGURATION, "[auth.openapi.key]", f"bearer = {json.dumps(running.admin_key)}"]
    for name, values in ids.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    lines += ["[dictionaries.no_wait]", "values = [0, 0.1]", "[parameters]", NO_WAIT]
    for place, name in places.items():
        lines.append(f'"{place}" = {{ dictionary = "{name}", probability = 0.7 }}')
    return "\n".join(lines)


@contextmanager
def freezing(running: RunningGateway) -> Iterator[None]:
    """A worker that freezes data sets, as requests wait for it; other jobs stay queued."""
    stopping = threading.Event()

    def work() -> None:
        # Looked for in turns: nobody tells a worker that a job was queued.
        while not stopping.wait(0.05):
            _freeze_one(running.database, running.gateway.settings.data)

    thread = threading.Thread(target=work, name="freezing")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _freeze_one(database: Database, data: Path) -> None:
    with database.read() as session:
        if not jobs.has_queued(session, [JobKind.FREEZE]):
            return
    with database.write() as session:
        job = jobs.claim_job(session, "freezing", kinds=[JobKind.FREEZE])
    if job is None:
        return
    dataset_id = str(job.spec["dataset_id"])
    frozen = datasets.freeze(database, dataset_id, data=data, check=lambda: None)
    with database.write() as session:
        datasets.finish_freeze(session, dataset_id, frozen)
        jobs.finish(session, job, {})


def _upload(client: httpx.Client) -> str:
    files = {"file": ("rows.jsonl", UPLOAD)}
    reply = client.post("/v1/files", files=files, data={"purpose": PURPOSE})
    return str(reply.json()["id"])
