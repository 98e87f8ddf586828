"""An answer whose gateway ends while it is under way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from feedback.answers import MessagesHash
from feedback.db import Database
from feedback.people import find_or_create_person
from feedback.tables import Answer, AnswerStatus, AnswerText
from server.chat import relay
from server.chat.recorder import Recorder
from server.chat.relay import Exchange, Relay
from server.chat.stream import DONE
from server.engines.base import EngineReply
from server.engines.chooser import Chooser
from server.http.replies import Reply
from server.metrics import Figures
from tests.rows import started_answer

pytestmark = pytest.mark.anyio

SECONDS = 10.0


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"model": "tiny", "choices": [choice]}).encode()


class OneEngine:
    """A chooser of one engine that says `events`, and then `ends` or only comments for ever."""

    def __init__(self, *events: bytes, ends: bool) -> None:
        self._events = events
        self._ends = ends
        self.is_silent = asyncio.Event()

    def suspect(self, _replica: Any, _reason: str) -> None:
        pass

    def find_another(self, _engine_name: str, _than: Any) -> None:
        return None

    def choose(self, _engine_name: str) -> Any:
        return SimpleNamespace(id="engine-0", engine=self)

    @contextmanager
    def run(self, _replica: Any, _engine_name: str) -> Iterator[None]:
        yield

    @asynccontextmanager
    async def post(self, *_arguments: Any, **_named: Any) -> AsyncIterator[EngineReply]:
        async def body() -> AsyncIterator[bytes]:
            for one in self._events:
                yield one
            self.is_silent.set()
            while not self._ends:
                await asyncio.sleep(0.01)
                yield b": ping\n\n"

        yield EngineReply(200, {}, body())


class Client:
    """Takes `most` messages of a reply, and then nothing more until it `reads` again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.received: list[Any] = []
        self.is_held_up = asyncio.Event()
        self.reads = asyncio.Event()

    async def send(self, message: Any) -> None:
        if len(self.received) >= self._most:
            self.is_held_up.set()
            await self.reads.wait()
        self.received.append(message)


async def never() -> Any:
    await asyncio.Event().wait()


@pytest.fixture
async def recorder(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Recorder]:
    recorder = Recorder(sqlite_database, tmp_path / "letters.jsonl")
    await recorder.start()
    yield recorder
    await recorder.stop()


async def begin(
    database: Database,
    recorder: Recorder,
    engine: OneEngine,
    client: Client,
    engine_timeout: float = SECONDS,
    commit_timeout: float = SECONDS,
) -> tuple[asyncio.Task[None], str]:
    """A stream that is under way, and its id."""
    with database.write() as session:
        person = find_or_create_person(session, "anna").id
    started = started_answer(person, gateway="gw_1")
    path, figures = "/v1/chat/completions", Figures()
    relay = Relay(
        Exchange(
            path=path,
            body=b"{}",
            request_id="1",
            engine_name="tiny",
            public_name="assistant@0",
            stream=True,
            include_usage=False,
            n=1,
            started=started,
            said=MessagesHash(person, started.messages),
        ),
        chooser=cast(Chooser, engine),
        recorder=recorder,
        commit_timeout=commit_timeout,
        engine_timeout=engine_timeout,
        figures=figures,
        began=0.0,
        on_missing_person=lambda: None,
    )
    reply = Reply(client.send, "1", figures, route=path)
    return asyncio.ensure_future(relay.answer(never, reply)), started.id


async def test_an_answer_that_a_shutdown_cuts_off_is_recorded_whether_its_client_reads_or_not(
    sqlite_database: Database, recorder: Recorder
) -> None:
    engine, client = OneEngine(event("Wa"), event("ter"), ends=False), Client(most=3)
    task, answer_id = await begin(sqlite_database, recorder, engine, client)
    await engine.is_silent.wait()
    task.cancel()
    await client.is_held_up.wait()
    await recorder.stop()
    with sqlite_database.read() as session:
        answer = session.get_one(Answer, answer_id)
        assert (answer.status, answer.error_code) == (AnswerStatus.INTERRUPTED, "shutting_down")
        [choice] = session.get_one(AnswerText, answer_id).choices or []
    assert choice["message"]["content"] == "Water"
    client.reads.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert b'"code":"shutting_down"' in client.received[-1]["body"].replace(b" ", b"")


async def test_of_a_stream_nothing_leaves_before_its_start_is_recorded(
    sqlite_database: Database, recorder: Recorder
) -> None:
    engine, client = OneEngine(event("Wa"), event("ter"), ends=False), Client(most=99)
    locked = sqlite_database.engine.raw_connection()
    task, answer_id = await begin(sqlite_database, recorder, engine, client)
    locked.execute("BEGIN IMMEDIATE")
    await asyncio.sleep(0.1)  # long enough for the engine to say it all
    assert client.received == []
    locked.execute("ROLLBACK")
    await engine.is_silent.wait()
    assert client.received[0]["status"] == 200
    with sqlite_database.read() as session:
        assert session.get_one(Answer, answer_id).status == AnswerStatus.STARTED
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    locked.close()


async def test_a_stream_whose_start_cannot_be_recorded_is_refused_and_its_engine_let_go(
    sqlite_database: Database, recorder: Recorder
) -> None:
    engine, client = OneEngine(event("Wa"), event("ter"), ends=False), Client(most=99)
    locked = sqlite_database.engine.raw_connection()
    task, answer_id = await begin(sqlite_database, recorder, engine, client, commit_timeout=0.1)
    locked.execute("BEGIN IMMEDIATE")
    await task
    assert client.received[0]["status"] == 503
    assert b'"not_recorded"' in client.received[1]["body"]
    assert not engine.is_silent.is_set()  # it was not heard to the end
    locked.execute("ROLLBACK")
    locked.close()
    await recorder.stop()
    with sqlite_database.read() as session:
        answer = session.get_one(Answer, answer_id)
        assert (answer.status, answer.error_code) == (AnswerStatus.FAILED, "not_recorded")


async def test_an_end_that_a_shutdown_kept_from_its_client_is_taken_back(
    sqlite_database: Database, recorder: Recorder
) -> None:
    events = event("Wa"), event("ter", "stop"), DONE
    engine, client = OneEngine(*events, ends=True), Client(most=2)
    task, answer_id = await begin(sqlite_database, recorder, engine, client)
    await client.is_held_up.wait()
    with sqlite_database.read() as session:
        assert session.get_one(Answer, answer_id).status == AnswerStatus.COMPLETE
    task.cancel()
    client.reads.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert b'"code":"shutting_down"' in client.received[-1]["body"].replace(b" ", b"")
    await recorder.stop()
    with sqlite_database.read() as session:
        answer = session.get_one(Answer, answer_id)
        assert (answer.status, answer.error_code) == (AnswerStatus.INTERRUPTED, "not_delivered")


@pytest.mark.parametrize("done", [True, False])
async def test_an_engine_that_goes_on_after_the_end_holds_nobody(
    sqlite_database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    monkeypatch.setattr(relay, "END_SECONDS", 0.05)
    events = event("Water", "stop"), *([DONE] if done else [])
    engine, client = OneEngine(*events, ends=False), Client(most=9)
    task, answer_id = await begin(
        sqlite_database, recorder, engine, client, SECONDS if done else 0.05
    )
    await asyncio.wait_for(task, 60)
    assert (b"[DONE]" in client.received[-1]["body"]) is done
    assert b"ping" not in b"".join(one.get("body", b"") for one in client.received)
    await recorder.stop()
    with sqlite_database.read() as session:
        is_whole = session.get_one(Answer, answer_id).status == AnswerStatus.COMPLETE
    assert is_whole is done


async def test_a_stream_without_an_end_is_refused(
    sqlite_database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "LARGEST_STREAM", 1_000)
    client = Client(most=1_000)
    engine = OneEngine(event("Wa"), ends=False)
    task, _ = await begin(sqlite_database, recorder, engine, client)
    await asyncio.wait_for(task, 60)
    assert b"passes 1000 bytes" in client.received[-1]["body"]
