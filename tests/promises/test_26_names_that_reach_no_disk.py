"""Promise 26: names that are paths, or releases of other deployments, never reach the disk.

Names such as `../../x` and absolute paths are unknown.

Python tells an audit hook of every file that it opens and of every directory that it lists
(PEP 578); what only looks (`stat` and its like) it does not, so these functions tell here too.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import pytest

from server.access.scopes import ROUTES
from tests.everything import add_everything
from tests.fake_engine import FakeEngine
from tests.gateway_fixtures import EVERY_SCOPE, RunningGateway
from tests.promise_fixtures import Figures

pytestmark = pytest.mark.promises

CHAT = "/v1/chat/completions"


class Disk:
    """What this process asks of the disk, while somebody wants to know."""

    _heard: ClassVar[list[str] | None] = None
    _is_hooked: ClassVar[bool] = False
    #: Besides `os.stat` and the like, which have no events.
    _EVENTS: ClassVar[frozenset[str]] = frozenset(
        {"open", "glob.glob", "mmap.__new__", "shutil.copyfile", "ctypes.dlopen"}
    )
    _SILENT: ClassVar[tuple[str, ...]] = ("stat", "lstat", "access", "readlink", "statvfs")

    @classmethod
    @contextmanager
    def watched(cls, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """A list that grows with each path that is opened, listed or looked at, in any thread."""
        if not cls._is_hooked:
            sys.addaudithook(cls._hear)  # for good: there is no way to take it away
            cls._is_hooked = True
        with monkeypatch.context() as patch:
            for name in cls._SILENT:
                patch.setattr(os, name, cls._telling(name))
            cls._heard = heard = []
            try:
                yield heard
            finally:
                cls._heard = None

    @classmethod
    def _hear(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls._heard is not None and (event in cls._EVENTS or event.startswith("os.")):
            cls._heard.append(f"{event} {arguments[:1]}")

    @classmethod
    def _telling(cls, name: str) -> Any:
        function = getattr(os, name)

        def tell(path: Any, *arguments: Any, **options: Any) -> Any:
            if cls._heard is not None:
                cls._heard.append(f"os.{name} ({path!r},)")
            return function(path, *arguments, **options)

        return tell


NAMES = (
    "../../x",
    "../../../../../../etc/passwd",
    "..",
    ".",
    "/etc/passwd",
    "/models/tiny",
    "//etc//passwd",
    "~/x",
    "file:/etc/passwd",
    "assistant/../assistant",
    "assistant@../../x",
    "assistant@0/../../x",
    "../assistant@0",
    "assistant@/etc/passwd",
    "assistant@-1",
    "assistant@00",
    "assistant@0 ",
    "..%2f..%2fx",
    "..\\..\\x",
    "C:\\x",
    "a" * 256,
    "adapters/" + "0" * 64,
    "🪶@1",
)


def bodies(name: str) -> dict[str, list[dict[str, Any]]]:
    """Every route whose body names a model, a deployment, a release or a file."""
    messages = [{"role": "user", "content": "Hello"}]
    return {
        CHAT: [{"model": name, "messages": messages}],
        "/v1/completions": [{"model": name, "prompt": "Hello"}],
        "/v1/fine_tuning/jobs": [
            {"model": name, "training_file": "ds_1"},
            {"model": "assistant", "training_file": name},
            {"model": "assistant", "training_file": f"ds_{name}"[:256]},
        ],
        "/admin/datasets": [{"deployment": name, "wait_seconds": 0}],
        "/admin/evaluations": [{"release": name}, {"release": "assistant@0", "baseline": name}],
        "/admin/keys": [{"user": "x", "scopes": ["chat"], "deployments": [name]}],
        "/admin/deployments/assistant/promote": [{"release": name, "force": True, "note": "x"}],
        "/v1/feedback": [{"completion_id": name, "kind": "rating", "value": True}],
    }


def paths(name: str) -> list[tuple[str, str]]:
    """Every route whose path names something, with `name` in it: as one segment, and raw."""
    found = []
    for method, template in ROUTES:
        if "{" in template and not template.startswith("/internal"):
            before, _, rest = template.partition("{")
            after = rest.partition("}")[2]
            found += [(method, before + quote(name, safe="") + after)]
            found += [(method, before + quote(name, safe="/.~@") + after)]
    return found


@pytest.fixture
def limited(sqlite_gateway: RunningGateway) -> str:
    """A key of every scope that is limited to `assistant`, of somebody who is known already."""
    key = sqlite_gateway.key("max", *EVERY_SCOPE, deployments=["assistant"])
    sqlite_gateway.client(key).get("/admin/whoami")
    return key


def test_the_watch_sees_what_is_opened_listed_and_looked_at(
    sqlite_gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = sqlite_gateway.candidate(1)
    ids = add_everything(sqlite_gateway, "poet", "bea")
    admin = sqlite_gateway.client()
    body = {"model": candidate.name, "messages": [{"role": "user", "content": "Hello"}]}
    with Disk.watched(monkeypatch) as heard:
        assert admin.post(CHAT, json=body).status_code == 200
        loading = list(heard)
        heard.clear()
        assert admin.get(f"/v1/files/{ids['file_id']}").status_code == 200
    weights = f"{candidate.content_hash}/adapter_model.safetensors"
    assert [line for line in loading if line.startswith("open") and weights in line]
    assert [line for line in heard if line.startswith("os.stat") and ids["dataset_id"] in line]
    with Disk.watched(monkeypatch) as heard:
        list(sqlite_gateway.gateway.settings.data.iterdir())
        list(os.scandir(sqlite_gateway.gateway.settings.data))
    assert [line.split()[0] for line in heard] == ["os.listdir", "os.scandir"]


def test_names_that_are_paths_are_unknown_and_reach_neither_disk_nor_engine(
    sqlite_gateway: RunningGateway,
    gateway_engine: FakeEngine,
    limited: str,
    monkeypatch: pytest.MonkeyPatch,
    figures: Figures,
) -> None:
    gateway_engine.requests.clear()
    asked = 0
    for key in (limited, sqlite_gateway.admin_key):
        with calling(sqlite_gateway.url, key) as caller, Disk.watched(monkeypatch) as heard:
            ask_once(caller)
            heard.clear()
            for name in NAMES:
                for path, sent in bodies(name).items():
                    for body in sent:
                        status, text = caller.ask("POST", path, body)
                        assert status == 404, (path, body, text)
                        asked += 1
                for method, path in paths(name):
                    status, text = caller.ask(method, path)
                    # A name with a slash may be the path of another route, or of none.
                    assert status in (400, 404, 405), (method, path, status, text)
                    asked += 1
        assert heard == []
    assert list(gateway_engine.requests) == []
    figures(requests=asked, names=len(NAMES), files_touched=0)


def test_releases_outside_the_key_s_list_are_unknown_and_reach_neither_disk_nor_engine(
    sqlite_gateway: RunningGateway,
    gateway_engine: FakeEngine,
    limited: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = add_everything(sqlite_gateway, "poet", "bea")
    sqlite_gateway.refresh()
    loads = gateway_engine.state()["loads"]
    gateway_engine.requests.clear()
    with calling(sqlite_gateway.url, limited) as caller, Disk.watched(monkeypatch) as heard:
        ask_once(caller)
        heard.clear()
        for name in (ids["release"], "poet@0", "poet"):
            for path, sent in bodies(name).items():
                for body in sent:
                    status, text = caller.ask("POST", path, body)
                    assert status == 404, (path, body, text)
            for path in (f"/v1/models/{name}", f"/admin/releases/{name}", f"/admin/explain/{name}"):
                assert caller.ask("GET", path)[0] == 404
            assert caller.ask("POST", f"/admin/releases/{name}/discard")[0] == 404
        for path in (f"/v1/files/{ids['file_id']}", f"/v1/files/{ids['file_id']}/content"):
            assert caller.ask("GET", path)[0] == 404
        assert caller.ask("GET", f"/admin/adapters/{ids['adapter_id']}")[0] == 404
    assert heard == []
    assert list(gateway_engine.requests) == []
    assert gateway_engine.state()["loads"] == loads


def ask_once(caller: Caller) -> None:
    """The first refusal of a body has FastAPI look for the route's source, once in a process."""
    for method, path in (*paths("x"), *(("POST", path) for path in bodies("x"))):
        caller.ask(method, path)


@contextmanager
def calling(url: str, key: str) -> Iterator[Caller]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    with closing(connection):
        yield Caller(connection, key)


class Caller:
    """A client that sends paths as they are: others take `..` out of them."""

    def __init__(self, connection: http.client.HTTPConnection, key: str) -> None:
        self._connection = connection
        self._key = key

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        headers = {"authorization": f"Bearer {self._key}"}
        raw = b""
        if method in ("POST", "PATCH"):
            raw = json.dumps(body or {}).encode()
            headers["content-type"] = "application/json"
        self._connection.request(method, path, raw, headers)
        reply = self._connection.getresponse()
        return reply.status, reply.read().decode()
