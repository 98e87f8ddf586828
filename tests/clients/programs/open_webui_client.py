"""Open WebUI as its users have it, in front of Burnish: started for the first time, and chatted in.

It does what its own page does, over the routes that the page calls. Nothing is fetched at run time:
it is offline, its data is in a folder that goes, and documents' embeddings are left to nobody.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import report

QUESTION, FURTHER = "What is a tide?", "And what is a spring tide?"
START_SECONDS = 300.0
ANSWER_SECONDS = 60.0
TASKS = {"title_generation": True, "tags_generation": True, "follow_up_generation": True}


def settings(folder: Path) -> dict[str, str]:
    """What `docs/open-webui.md` says, and what keeps it from the network."""
    return {
        "OPENAI_API_BASE_URL": os.environ["OPENAI_BASE_URL"],
        "OPENAI_API_KEY": os.environ["OPENAI_API_KEY"],
        "ENABLE_FORWARD_USER_INFO_HEADERS": "true",
        "ENABLE_OLLAMA_API": "false",
        "DATA_DIR": str(folder),
        "WEBUI_SECRET_KEY": "for a test",
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",  # else it would want a model of a hub
        "ANONYMIZED_TELEMETRY": "false",
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
    }


class Page:
    """What a person's page asks of Open WebUI."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.session = uuid.uuid4().hex

    def get(self, path: str) -> Any:
        return self._client.get(path).raise_for_status().json()

    def post(self, path: str, body: Any) -> Any:
        return self._client.post(path, json=body).raise_for_status().json()

    def sign_up(self) -> dict[str, Any]:
        """The first one is the administrator."""
        form = {"name": "Ada", "email": "ada@example.org", "password": "a tide a day"}
        user: dict[str, Any] = self.post("/api/v1/auths/signup", form)
        self._client.headers["authorization"] = f"Bearer {user['token']}"
        return {name: user[name] for name in ("id", "role")}

    def say(self, text: str, chat: str | None = None, parent: str | None = None) -> tuple[str, str]:
        """Send a turn; the ids of the chat and of the answer, which is on its way then."""
        number, answer = str(uuid.uuid4()), str(uuid.uuid4())
        turn = {
            "id": number,
            "parentId": parent,
            "childrenIds": [],
            "role": "user",
            "content": text,
            "timestamp": int(time.time()),
            "models": ["assistant"],
        }
        body = {
            "stream": True,
            "model": "assistant",
            "messages": [{"role": "user", "content": text}],
            "params": {},
            "features": {},
            "variables": {},
            "session_id": self.session,
            "id": answer,
            "parent_id": parent,
            "user_message": turn,
            "background_tasks": TASKS if chat is None else {"follow_up_generation": True},
            **({} if chat is None else {"chat_id": chat}),
        }
        begun = self.post("/api/chat/completions", body)
        return begun["chat_id"], answer

    def await_answer(self, chat: str, message: str) -> str:
        """What it says in the chat once it is whole and nothing of the chat is under way."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            history = self.get(f"/api/v1/chats/{chat}")["chat"]["history"]["messages"]
            found = history.get(message, {})
            if found.get("error"):
                raise AssertionError(found["error"])
            if found.get("done") and not self.get(f"/api/tasks/chat/{chat}")["task_ids"]:
                said: str = found["content"]
                return said
            if time.monotonic() > deadline:
                raise AssertionError(f"no whole answer: {found}")
            time.sleep(0.2)  # it tells its page by a socket of its own


def first_start() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [str(Path(sys.executable).with_name("open-webui")), "serve"]
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, **settings(folder)},
                stdout=output,
                stderr=output,
            )
        try:
            options: Any = {"timeout": ANSWER_SECONDS, "trust_env": False}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", **options) as client:
                began = time.monotonic()
                await_health(client, process)
                return {"seconds": time.monotonic() - began, **chatted(Page(client))}
        except Exception as error:
            raise AssertionError(f"{error!r}\n{log.read_text()[-4000:]}") from error
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def await_health(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}")
        time.sleep(0.2)  # another process: its port is asked
    raise AssertionError(f"not up within {START_SECONDS:.0f} s")


def chatted(page: Page) -> dict[str, Any]:
    onboarding = page.get("/api/config")["onboarding"]
    user = page.sign_up()
    models = [model["id"] for model in page.get("/api/models")["data"]]
    chat, first = page.say(QUESTION)
    answers = [page.await_answer(chat, first)]
    chat, second = page.say(FURTHER, chat, first)
    answers.append(page.await_answer(chat, second))
    return {
        "onboarding": onboarding,
        "user": user,
        "models": models,
        "chat": chat,
        "answers": answers,
        "title": page.get(f"/api/v1/chats/{chat}")["title"],
    }


if __name__ == "__main__":
    report.run({"first_start": first_start})
