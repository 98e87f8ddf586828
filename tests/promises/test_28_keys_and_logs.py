"""Promise 28: keys are kept safe, and neither keys nor prompt text get into logs.

Keys are kept as hashes, shown once, compared in constant time, and revoked everywhere within 5 s.
"""

from __future__ import annotations

import ast
import hmac
import inspect
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, select, text

import server.access.keys
import server.access.tokens
from feedback.db import Base, Database
from feedback.errors import NotAuthenticated
from server.access import tokens
from server.access.keyring import Keyring, KeyView, hash_key, load_keyring
from server.access.keys import KEY_PREFIX, create_key, now
from server.access.scopes import Scope
from server.access.signing import secret_path
from server.setup.upgrade import read_internal_key
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.canaries import Canaries, client, service, variables, wait_for
from tests.promises.processes import gateway_process
from tests.promises.scale import scaled
from tests.rows import add_answer

pytestmark = pytest.mark.promises

CHAT = "/v1/chat/completions"
MOST_SECONDS = 5.0


# Keys


def test_a_key_is_shown_once_and_kept_as_a_hash(running_gateway: RunningGateway) -> None:
    admin, database = running_gateway.client(), running_gateway.database
    body = {"user": "anna", "scopes": ["chat", "feedback"]}
    again = {"idempotency-key": "a-try"}
    made = admin.post("/admin/keys", json=body, headers=again)
    key, key_id = made.json()["key"], made.json()["id"]
    assert key.startswith(KEY_PREFIX)
    assert len(key) >= len(KEY_PREFIX) + 32  # 192 bits in base64
    assert running_gateway.client(key).get("/v1/models").status_code == 200
    later = [
        admin.post("/admin/keys", json=body, headers=again),
        admin.get("/admin/keys"),
        admin.get("/admin/audit"),
        admin.get("/metrics"),
        running_gateway.client(key).get("/admin/whoami"),
    ]
    kept = dump(database)
    later.append(admin.delete(f"/admin/keys/{key_id}"))
    for reply in later:
        assert reply.status_code < 300, reply.text
        assert key not in reply.text, reply.url
        assert key.removeprefix(KEY_PREFIX) not in reply.text, reply.url
    for shown in (kept, dump(database)):
        assert key_id in shown
        assert hash_key(key) in shown
        for token in (key, running_gateway.admin_key, running_gateway.worker_key):
            assert token not in shown
            assert token.removeprefix(KEY_PREFIX) not in shown


def test_no_copy_of_the_database_holds_what_tokens_and_the_audit_log_are_signed_with(
    running_gateway: RunningGateway,
) -> None:
    answer = add_answer(running_gateway.database, "anna")
    anna = running_gateway.client(running_gateway.key("anna"))
    body = {"completion_id": answer, "expires_in_seconds": 60}
    token = anna.post("/v1/feedback/tokens", json=body).json()["token"]
    made = running_gateway.client().post("/admin/keys", json={"user": "bea", "scopes": ["chat"]})
    signing = running_gateway.gateway.signing
    kept = dump(running_gateway.database)
    assert made.json()["id"] in kept
    assert signing.name in kept  # the audit log says which secret signed it
    secret = secret_path(running_gateway.gateway.settings).read_text().strip()
    keys = [key.hex() for key in signing.seal.keys.values()]
    for hidden in (secret, signing.tokens, *keys, token):
        assert hidden not in kept


def test_every_key_that_is_looked_up_is_compared_by_compare_digest(
    sqlite_database: Database,
) -> None:
    with sqlite_database.write() as session:
        _, token = create_key(session, user="anna", scopes=[Scope.CHAT])
    with sqlite_database.read() as session:
        ring = load_keyring(session)
    assert compared(lambda: ring.authenticate(f"Bearer {token}")) == 1
    # A key that is found and is another is refused: it is the comparison that decides.
    key = KeyView("key_1", hash_key("another"), "anna", frozenset({"chat"}), None, False)
    false_ring = Keyring({hash_key(token): key})
    with pytest.raises(NotAuthenticated):
        false_ring.authenticate(f"Bearer {token}")
    signed = tokens.sign(tokens.Grant("chatcmpl-1", "p", "key_1", 2**40), "s")
    assert compared(lambda: tokens.read_token(signed, "s", now())) == 1


@pytest.mark.parametrize("module", [server.access.keys, server.access.tokens])
def test_no_secret_is_compared_by_an_operator(module: Any) -> None:
    secret = {"token", "digest", "sha256", "signature", "secret", "signature_text"}
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], ast.Is | ast.IsNot):
            for side in (node.left, *node.comparators):
                if isinstance(side, ast.Name | ast.Attribute) and ast.unparse(side) in secret:
                    found.append(ast.unparse(node))
    assert found == []


def test_a_revoked_key_is_refused_by_every_gateway_within_5_s(
    postgres_database: Database, tmp_path: Path, figures: Figures
) -> None:
    rounds, slowest = scaled(40), 0.0
    with service(postgres_database, tmp_path) as (settings, engine):
        options = {
            **variables(postgres_database),
            # As it is by default: what the other processes of these tests shorten.
            "BURNISH_GATEWAY__REFRESH_SECONDS": str(settings.gateway.refresh_seconds),
        }
        path, log = Path(settings.model.path), tmp_path / "log"
        with (
            gateway_process(settings.data, path, engine, log, **options) as one,
            gateway_process(settings.data, path, engine, log, **options) as two,
        ):
            admin_key = json.loads((settings.data / "credentials").read_text())["api_key"]
            for _ in range(rounds):
                with client(one.url, admin_key) as admin, client(two.url, "none") as other:
                    body = {"user": "anna", "scopes": ["chat", "feedback"]}
                    made = admin.post("/admin/keys", json=body).json()
                    other.headers["authorization"] = f"Bearer {made['key']}"
                    wait_for(other, 200)
                    began = time.monotonic()
                    assert admin.delete(f"/admin/keys/{made['id']}").status_code == 200
                    admin.headers["authorization"] = other.headers["authorization"]
                    assert admin.get("/v1/models").status_code == 401  # at once where it was done
                    wait_for(other, 401)
                    slowest = max(slowest, time.monotonic() - began)
                    for path_ in ("/v1/models", "/v1/feedback", CHAT):
                        assert other.get(path_).status_code == 401
    assert slowest <= MOST_SECONDS
    figures(keys_revoked=rounds, slowest_seconds=round(slowest, 2))


# Logs


@pytest.fixture(params=["sqlite", "postgresql"])
def migrated(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database, on SQLite in the data directory and on PostgreSQL."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgres_database")
        return
    (tmp_path / "data").mkdir()
    database = Database(f"sqlite:///{tmp_path / 'data' / 'burnish.sqlite3'}")
    yield database
    database.dispose()


def test_neither_keys_nor_texts_get_into_logs(
    migrated: Database, tmp_path: Path, figures: Figures
) -> None:
    canaries = Canaries()
    with service(migrated, tmp_path) as (settings, engine):
        options = {**variables(migrated), "BURNISH_LOG_LEVEL": "debug"}
        log = tmp_path / "gateway.log"
        path = Path(settings.model.path)
        with gateway_process(settings.data, path, engine, log, **options) as gateway:
            admin_key = json.loads((settings.data / "credentials").read_text())["api_key"]
            keys = {"admin": admin_key, "worker": read_internal_key(settings) or ""}
            with client(gateway.url, admin_key) as admin:
                for user in ("anna", "shop"):
                    body = {"user": user, "scopes": ["chat", "feedback", "tune"]}
                    keys[user] = admin.post("/admin/keys", json=body).json()["key"]
                with client(gateway.url, keys["anna"]) as anna:
                    statuses = Calls(anna, admin, engine, migrated, canaries, keys).all()
            assert gateway.terminate() == 0
    assert {200, 201, 400, 401, 403, 404, 413, 500, 502, 503} <= statuses, statuses
    assert len(canaries.by_place) > 30
    written = log.read_text()
    actions = {json.loads(line).get("action") for line in written.splitlines()}
    # What was to be provoked was.
    assert {"request_failed", "database_unavailable", "not_recorded", "integrity_error"} <= actions
    leaks = [place for place, canary in canaries.by_place.items() if canary in written]
    leaks += [name for name, key in keys.items() if key.removeprefix(KEY_PREFIX) in written]
    assert leaks == []
    shown = dump(migrated)
    for place in ("a message", "a comment", "a correction", "metadata"):
        assert canaries.by_place[place] in shown  # the search finds what is there
    private = {"credentials": "admin", "internal.key": "worker"}
    for file in (file for file in settings.data.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for name, key in keys.items():
            if private.get(file.name) == name:
                assert file.stat().st_mode & 0o077 == 0
                assert key.encode() in content
            else:
                assert key.removeprefix(KEY_PREFIX).encode() not in content, (file, name)
        if not file.name.startswith("burnish.sqlite3") and file.suffix != ".jsonl":
            # Rows of answers that could not be written and uploads are records, and no logs.
            assert not [c for c in canaries.by_place.values() if c.encode() in content], file
    assert not [name for name, key in keys.items() if key.removeprefix(KEY_PREFIX) in shown]
    figures(texts=len(canaries.by_place), lines=len(written.splitlines()), leaks=0)


class Calls:
    """Requests of every sort, right and wrong, each with texts of its own."""

    def __init__(
        self,
        anna: httpx.Client,
        admin: httpx.Client,
        engine: str,
        database: Database,
        canaries: Canaries,
        keys: dict[str, str],
    ) -> None:
        self.anna, self.admin, self.engine = anna, admin, engine
        self.database, self.canary, self.keys = database, canaries, keys
        self.statuses: set[int] = set()

    def all(self) -> set[int]:
        """Make them all; the statuses that came back."""
        self.set_prompt()
        answers = self.chat()
        self.judge(answers)
        self.upload()
        self.break_bodies(answers)
        self.misuse_keys()
        self.break_engine()
        self.break_database(answers)
        return self.statuses

    def note(self, reply: httpx.Response) -> httpx.Response:
        self.statuses.add(reply.status_code)
        return reply

    def say(self, place: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.canary(place)}]
        return {"model": "assistant", "messages": messages, **more}

    def ask(self, place: str, **more: Any) -> httpx.Response:
        return self.note(self.anna.post(CHAT, json=self.say(place, **more)))

    def set_prompt(self) -> None:
        prompt = {"system_prompt": self.canary("the deployment's prompt")}
        changed = self.note(self.admin.patch("/admin/deployments/assistant", json=prompt))
        body = {"release": changed.json()["candidate"], "force": True, "note": "for a test"}
        promoted = self.admin.post("/admin/deployments/assistant/promote", json=body)
        assert self.note(promoted).status_code == 200, promoted.text

    def chat(self) -> list[str]:
        function = {"name": "look", "description": self.canary("a tool")}
        whole = self.ask(
            "a message",
            metadata={"note": self.canary("metadata")},
            user=self.canary("a user"),
            tools=[{"type": "function", "function": function}],
            tool_choice="none",
            **{self.canary("a field's name"): self.canary("an unknown field")},
        )
        other = self.ask("a message", n=2)
        self.ask("a streamed message", stream=True)
        turns = [
            {"role": "system", "content": self.canary("a system message")},
            {"role": "user", "content": [{"type": "text", "text": self.canary("a part")}]},
        ]
        self.note(self.anna.post(CHAT, json={"model": "assistant", "messages": turns}))
        text = {"model": "assistant", "prompt": self.canary("a text"), "suffix": None}
        self.note(self.anna.post("/v1/completions", json=text))
        return [whole.json()["id"], other.json()["id"]]

    def judge(self, answers: list[str]) -> None:
        verdicts = [
            {"kind": "comment", "value": self.canary("a comment")},
            {"kind": "correction", "value": self.canary("a correction")},
            {"kind": "rating", "value": True, "comment": self.canary("a rating's comment")},
            {"kind": "rating", "value": False, "metadata": {"a": self.canary("its metadata")}},
            {"kind": "stars", "value": self.canary("a value that is none")},
            {"kind": "signal", "name": "copied", "value": self.canary("a signal")},
            {"kind": self.canary("a kind"), "value": 1},
        ]
        for verdict in verdicts:
            self.note(self.anna.post("/v1/feedback", json={"completion_id": answers[0], **verdict}))
        pair = {"completion_ids": answers, "preferred": "a"}
        compared = {**pair, "comment": self.canary("a comparison's comment")}
        self.note(self.anna.post("/v1/comparisons", json=compared))
        listed = self.anna.get(CHAT, params={"metadata[note]": self.canary("metadata")})
        assert len(self.note(listed).json()["data"]) == 1

    def upload(self) -> None:
        def line(place: str) -> bytes:
            said = [
                {"role": "user", "content": self.canary(place)},
                {"role": "assistant", "content": "Yes."},
            ]
            return json.dumps({"messages": said}).encode() + b"\n"

        for content in (line("a row") * 12, b'{"messages": "' + line("a bad row")):
            form = {"files": {"file": ("rows.jsonl", content)}, "data": {"purpose": "fine-tune"}}
            self.note(self.anna.post("/v1/files", **form))

    def break_bodies(self, answers: list[str]) -> None:
        cut = json.dumps(self.say("a body that ends early"))[:-2].encode()
        # One byte too many: of more the gateway would read no more, and reset the connection.
        large = json.dumps(self.say("a large body")).encode().ljust(2**20 + 1)
        json_type = {"content-type": "application/json"}
        for content in (cut, large, b'{"a": "\xff' + self.canary("no UTF-8").encode() + b'"}'):
            for path in (CHAT, "/v1/completions", "/v1/feedback", f"{CHAT}/{answers[0]}"):
                self.note(self.anna.post(path, content=content, headers=json_type))
        for more in (
            {"chat_template": self.canary("a template")},
            {"temperature": self.canary("a temperature")},
            {"messages": self.canary("messages that are none")},
            {"messages": [{"role": self.canary("a role"), "content": "x"}]},
            {"messages": [{"role": "user", "content": {"a": self.canary("an odd content")}}]},
            {"model": self.canary("a model")},
            {"metadata": {"a": self.canary("nested metadata") * 40}},
        ):
            self.ask("a refused message", **more)
        self.ask("a NUL", metadata={"a": "\x00"})
        self.note(self.anna.get(f"/v1/feedback/{self.canary('a path')}"))
        self.note(self.anna.get("/v1/feedback", params={"after": self.canary("a parameter")}))
        self.note(self.admin.post("/admin/datasets", json={"deployment": self.canary("a name")}))

    def misuse_keys(self) -> None:
        key, wrong = self.keys["shop"], KEY_PREFIX + self.canary("a wrong key")
        self.keys["revoked"] = revoked = self.admin.post(
            "/admin/keys", json={"user": "gone", "scopes": ["chat"]}
        ).json()["key"]
        listed = self.admin.get("/admin/keys", params={"limit": 1}).json()["data"]
        self.note(self.admin.delete(f"/admin/keys/{listed[0]['id']}"))
        for authorization in (f"Bearer {wrong}", f"Basic {key}", key, f"Bearer {revoked}"):
            headers = {"authorization": authorization}
            reply = self.anna.post(CHAT, json=self.say("unauthorised"), headers=headers)
            assert self.note(reply).status_code == 401
        self.note(self.anna.post("/admin/keys", json={"user": self.canary("forbidden")}))
        self.note(self.anna.get("/v1/models", params={"api_key": key}))
        self.note(self.anna.get(f"/v1/models/{key}"))
        self.note(self.anna.get(f"/{key}"))
        self.ask("a key as a field", api_key=key, model=key)

    def break_engine(self) -> None:
        for fault in (
            {"error_status": 500},
            {"error_status": 400},
            {"hangs_up": True},
            {"dies_after_tokens": 1},
            {"errs_after_tokens": 1},
            {"answers_as": "another"},
        ):
            httpx.post(f"{self.engine}/fake/faults", json=fault, trust_env=False)
            for stream in (False, True):
                self.ask(f"an answer with {next(iter(fault))}", stream=stream)
        httpx.post(f"{self.engine}/fake/faults", json={}, trust_env=False)
        wait_for(self.anna, 200, "/readyz")
        # Somebody who leaves in mid-stream.
        httpx.post(f"{self.engine}/fake/faults", json={"token_seconds": 0.05}, trust_env=False)
        with self.anna.stream("POST", CHAT, json=self.say("left", stream=True)) as reply:
            next(reply.iter_raw())
        httpx.post(f"{self.engine}/fake/faults", json={}, trust_env=False)

    def break_database(self, answers: list[str]) -> None:
        """Statements that fail, whose errors know the values; then tables that are gone."""
        comment = {"completion_id": answers[0], "kind": "comment"}
        for table in ("judgements", "answers", "answer_texts", "files"):
            with refusing(self.database, table):
                self.ask(f"{table} refused")
                self.ask(f"{table} refused", stream=True)
                verdict = {**comment, "value": self.canary(f"a comment, {table} refused")}
                self.note(self.anna.post("/v1/feedback", json=verdict))
                self.upload()
        for table in ("judgements", "answers", "answer_texts"):
            with missing(self.database, table):
                self.ask(f"{table} missing")
                verdict = {**comment, "value": self.canary(f"a comment, {table} missing")}
                self.note(self.anna.post("/v1/feedback", json=verdict))
                filter_ = {"metadata[note]": self.canary("a filter")}
                self.note(self.anna.get(CHAT, params=filter_))
        with away(self.database):
            self.ask("no database")
            verdict = {**comment, "value": self.canary("a comment without a database")}
            self.note(self.anna.post("/v1/feedback", json=verdict))
        deadline = time.monotonic() + 10
        while self.ask("all is well again").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)  # the writer looks twice a second whether the database is back


@contextmanager
def refusing(database: Database, table: str) -> Iterator[None]:
    """Every new or changed row of the table breaks a rule; PostgreSQL's error repeats the row."""
    if database.is_sqlite:
        begin = [
            f"CREATE TRIGGER refuse_{when} BEFORE {when} ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
            for when in ("INSERT", "UPDATE")
        ]
        end = [f"DROP TRIGGER refuse_{when}" for when in ("INSERT", "UPDATE")]
    else:
        begin = [f"ALTER TABLE {table} ADD CONSTRAINT refuse CHECK (false) NOT VALID"]
        end = [f"ALTER TABLE {table} DROP CONSTRAINT refuse"]
    with altered(database, begin, end):
        yield


@contextmanager
def away(database: Database) -> Iterator[None]:
    """PostgreSQL lets nobody in any more; of SQLite a table is gone, which is the same error."""
    if database.is_sqlite:
        with missing(database, "answers"):
            yield
        return
    name = database.url.database
    elsewhere = create_engine(database.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        with elsewhere.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                ),
                {"name": name},
            )
            try:
                yield
            finally:
                connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    finally:
        elsewhere.dispose()


@contextmanager
def missing(database: Database, table: str) -> Iterator[None]:
    begin, end = f"ALTER TABLE {table} RENAME TO gone", f"ALTER TABLE gone RENAME TO {table}"
    with altered(database, [begin], [end]):
        yield


@contextmanager
def altered(database: Database, begin: list[str], end: list[str]) -> Iterator[None]:
    def run(statements: list[str]) -> None:
        with database.write() as session:
            for statement in statements:
                session.execute(text(statement))

    run(begin)
    try:
        yield
    finally:
        run(end)


# Both


def dump(database: Database) -> str:
    """All rows of all tables as text; of SQLite also the files, deleted pages and all."""
    with database.read() as session:
        rows = [
            repr(tuple(row))
            for table in Base.metadata.sorted_tables
            for row in session.execute(select(table))
        ]
    shown = "\n".join(rows)
    if database.is_sqlite:
        file = Path(str(database.url.database))
        for part in file.parent.glob(f"{file.name}*"):
            shown += part.read_bytes().decode("latin-1")
    return shown


def compared(work: Any) -> int:
    """How often `work` calls `hmac.compare_digest`."""
    calls = 0

    def profile(_frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "c_call" and argument is hmac.compare_digest

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls
