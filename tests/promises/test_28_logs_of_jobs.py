"""Promise 28, of jobs and uploads: what people wrote gets into no log, event or error.

The logs are those of the worker, the trainer and the reader of uploads; events and errors are a
job's.

The worker, the trainer and the reader are the real ones, as processes; the model is tiny, and its
template refuses a conversation in the words of that conversation. What is left out of the small run
is a second trainer, which finds nothing that it can render.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from feedback.db import Database
from feedback.errors import AppError
from feedback.formats.__main__ import ORIGINAL
from feedback.formats.records import Limits
from feedback.reading import Effort, Reader
from feedback.tables import AuditEntry, File
from server.access.keys import KEY_PREFIX
from server.setup.upgrade import read_internal_key
from tests.promise_fixtures import Figures
from tests.promises.canaries import Canaries, client, service
from tests.promises.processes import gateway_process, worker_process
from tests.promises.scale import is_full
from tests.tiny_model import CHAT_TEMPLATE, DEFAULT_SYSTEM
from tuner.base_models import describe_base
from tuner.jobs import ENDED
from tuner.tables import Evaluation, Job, JobEvent

pytestmark = pytest.mark.promises

REFUSED = "a conversation that the template refuses"
TEMPLATE = (
    "{% for message in messages %}{% if '" + REFUSED + "' in message['content'] %}"
    "{{ raise_exception('it takes no ' + message['content']) }}{% endif %}{% endfor %}"
    + CHAT_TEMPLATE
)
WAIT_SECONDS = 60.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "data").mkdir()
    database = Database(f"sqlite:///{tmp_path / 'data' / 'burnish.sqlite3'}")
    yield database
    database.dispose()


def test_jobs_repeat_neither_keys_nor_what_people_wrote(
    database: Database, tiny_model: Path, tmp_path: Path, figures: Figures
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "tiny")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    canaries, log = Canaries(), tmp_path / "worker.log"
    debug = {"BURNISH_LOG_LEVEL": "debug"}
    base, options = describe_base(model, "tiny"), ("--default-system", DEFAULT_SYSTEM)
    with service(database, tmp_path, base, *options) as (settings, engine):
        gateway_log = tmp_path / "gateway.log"
        with gateway_process(settings.data, model, engine, gateway_log, **debug) as gateway:
            admin_key = json.loads((settings.data / "credentials").read_text())["api_key"]
            keys = [admin_key, read_internal_key(settings) or ""]
            with client(gateway.url, admin_key) as admin:
                scopes = ["chat", "feedback", "tune", "curate"]
                made = admin.post("/admin/keys", json={"user": "anna", "scopes": scopes})
                keys.append(made.json()["key"])
                prompt = {"system_prompt": canaries("a candidate's prompt")}
                changed = admin.patch("/admin/deployments/assistant", json=prompt).json()
            with (
                client(gateway.url, keys[-1]) as anna,
                worker_process(settings, gateway.url, log, **debug),
            ):
                jobs = Jobs(anna, database, settings.data, canaries)
                ended = jobs.do_all(candidate=changed["candidate"])
            assert gateway.terminate() == 0
    assert ended == {
        "evaluated": None,
        "evaluated by a holdout that is none": "internal_error",
        "trained": None,
        "trained on what changed on disk": "training_data_damaged",
        **({"trained on nothing that can be rendered": "nothing_to_learn"} if is_full() else {}),
    }
    written = {log.name: log.read_text(), gateway_log.name: gateway_log.read_text()}
    for file in settings.data.glob("jobs/*/*"):
        if file.is_file():
            written[f"{file.parent.name}/{file.name}"] = file.read_text()
    assert sum(name.endswith("trainer.log") for name in written) == 1 + is_full()
    actions = {json.loads(line).get("action") for line in written[log.name].splitlines()}
    assert {"trainer_started", "job_succeeded", "job_failed", "job_crashed"} <= actions
    with database.read() as session:
        for table in (Job, JobEvent, Evaluation, AuditEntry):
            rows = session.execute(select(table.__table__)).all()
            assert rows
            written[table.__tablename__] = "\n".join(map(repr, rows))
    hidden = {**canaries.by_place, **{key: key.removeprefix(KEY_PREFIX) for key in keys}}
    leaks = [
        (name, place)
        for name, text in written.items()
        for place, canary in hidden.items()
        if canary in text
    ]
    assert leaks == []
    kept = "".join(file.read_text() for file in settings.data.glob("files/**/*.jsonl"))
    assert all(canaries.by_place[place] in kept for place in ("good row 0", "a long row"))
    figures(texts=len(canaries.by_place), logs_and_tables=len(written), leaks=0)


class Jobs:
    """Jobs that succeed and jobs that fail, on texts of their own; what each ended with."""

    def __init__(
        self, anna: httpx.Client, database: Database, data: Path, canaries: Canaries
    ) -> None:
        self.anna, self.database, self.data, self.canary = anna, database, data, canaries

    def do_all(self, *, candidate: str) -> dict[str, str | None]:
        """Have them all done; the error code by what was done, None of what succeeded."""
        refused = [self.row("a refused row", REFUSED), self.row("a long row", "x" * 600)]
        good = [self.row(f"good row {number}", str(number * 7919)) for number in range(8)]
        dataset = self.freeze()
        ended = {"evaluated": self.evaluate(candidate)}
        self.spoil_holdout(dataset)
        ended["evaluated by a holdout that is none"] = self.evaluate(candidate)
        ended["trained"] = self.tune(self.upload(good + refused))
        if is_full():  # another trainer takes as long as all the rest
            ended["trained on nothing that can be rendered"] = self.tune(self.upload(refused))
        ended["trained on what changed on disk"] = self.tune(self.damage())
        return ended

    def row(self, place: str, more: str = "") -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": f"{self.canary(place)} {more}"},
                {"role": "assistant", "content": self.canary(f"the answer of {place}")},
            ]
        }

    def freeze(self) -> str:
        """A data set of corrections; one of them stands in a conversation that is refused."""
        for number in range(24):
            more = REFUSED if number == 0 else f"number {number * 7919}"
            said = [{"role": "user", "content": f"{self.canary(f'question {number}')} {more}"}]
            body = {"model": "assistant", "messages": said}
            answer = self.anna.post("/v1/chat/completions", json=body).raise_for_status().json()
            verdict = {
                "completion_id": answer["id"],
                "kind": "correction",
                "value": self.canary(f"correction {number}"),
                "comment": self.canary(f"comment {number}"),
            }
            self.anna.post("/v1/feedback", json=verdict).raise_for_status()
        body = {
            "deployment": "assistant",
            "wait_seconds": 60,
            "policy": {"holdout_share": 0.4},
        }
        dataset = self.anna.post("/admin/datasets", json=body, timeout=90).json()
        assert dataset["status"] == "ready", dataset
        assert dataset["counts"]["holdout"] > 0
        return str(dataset["id"])

    def upload(self, rows: list[dict[str, Any]]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        form = {"files": {"file": ("rows.jsonl", content)}, "data": {"purpose": "fine-tune"}}
        return str(self.anna.post("/v1/files", **form).raise_for_status().json()["id"])

    def damage(self) -> str:
        """An upload that somebody changed by hand."""
        upload = self.upload([self.row("an uploaded row")])
        with self.database.read() as session:
            path = self.data / session.get_one(File, upload).path
        path.write_text(json.dumps(self.row("a damaged row")) + "\n" + path.read_text())
        return upload

    def tune(self, training_file: str) -> str | None:
        body = {
            "model": "assistant",
            "training_file": training_file,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}},
            },
        }
        made = self.anna.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
        return self.end_of(made["id"])

    def evaluate(self, release: str) -> str | None:
        made = self.anna.post("/admin/evaluations", json={"release": release})
        return self.end_of(made.raise_for_status().json()["job_id"])

    def spoil_holdout(self, dataset: str) -> None:
        """The holdout's rows are something else by now."""
        with self.database.read() as session:
            of_it = select(File).where(File.dataset_id == dataset, File.side == "holdout")
            for file in session.scalars(of_it):
                row = {"id": "ex", self.canary("a holdout's key"): self.canary("a holdout's row")}
                (self.data / file.path).write_text(json.dumps(row) + "\n")

    def end_of(self, job_id: str) -> str | None:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with self.database.read() as session:
                job = session.get_one(Job, job_id)
            if job.status in ENDED:
                return job.error_code
            assert time.monotonic() < deadline, (job.kind, job.status)
            time.sleep(0.05)  # another process has no event to wait for


def parquet_of(**columns: list[Any]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def test_the_reader_of_uploads_logs_nothing_of_what_it_reads(
    tmp_path: Path, figures: Figures
) -> None:
    canary = Canaries()
    uploads = {
        "a row": json.dumps({"messages": [{"role": "user", "content": canary("a row")}]}).encode(),
        "bytes behind it": b'{"messages": "' + canary("bytes behind it").encode() + b"\xff\n",
        "csv": f'prompt,completion\n"{canary("csv")},x\n'.encode(),
        "a cell": f"prompt,completion\n{canary('a cell') * 400},y\n".encode(),
        "parquet": parquet_of(messages=[canary("parquet")], prompt=[canary("a column")]),
        "no parquet": b"PAR1" + canary("no parquet").encode() * 9 + b"PAR1",
        "memory": b'["' + canary("memory").encode() * 1_000_000,
    }
    refused = 0
    for name, content in uploads.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / ORIGINAL).write_bytes(content)
        limits = Limits(bytes=10_000_000, row_bytes=4_000)
        with pytest.raises(AppError):
            Reader(folder).read(format=None, columns=None, limits=limits, effort=Effort())
        refused += 1
        said = (folder / "reader.log").read_text()
        assert [place for place, text in canary.by_place.items() if text in said] == []
    figures(uploads=refused, leaks=0)
