"""A deletion leaves no byte: not in the database file, its log, or the dead letters."""

from __future__ import annotations

import errno
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import TimeoutError as PoolTimeout

from feedback.answers import delete_answer
from feedback.db import Database, now
from feedback.tables import Answer, Conversation
from server.chat.dead_letters import add_letter, remove_letters
from server.http import idempotency
from server.http.idempotency import KeptReply, build_attempt
from server.remains import Remains
from server.tables import IdempotentRequest, IdempotentSubject
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer

CANARY = "zyzzyva-canary"
CHAT, TEXT, FEEDBACK = "/v1/chat/completions", "/v1/completions", "/v1/feedback"


def files_with_canary(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.name for path in files if CANARY.encode() in path.read_bytes())


def folder_of(gateway: RunningGateway) -> Path:
    return Path(str(gateway.database.url.database)).parent


def ask(client: Any, path: str, **more: Any) -> str:
    said = {"messages": [{"role": "user", "content": f"About {CANARY} {path}"}]}
    body = {"model": "assistant", **(said if path == CHAT else {"prompt": CANARY}), **more}
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def test_what_is_deleted_is_nowhere_any_more(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client(sqlite_gateway.key("ana"))
    others = [
        add_answer(sqlite_gateway.database, "ben", prompt=f"Question {n}" * 50) for n in range(40)
    ]
    ids = [
        ask(client, CHAT),
        ask(client, CHAT, metadata={"task": "title_generation", "about": CANARY}),
        ask(client, TEXT),
    ]
    for completion_id in ids:
        judged = {"completion_id": completion_id, "kind": "comment", "value": f"No {CANARY}"}
        headers = {"Idempotency-Key": completion_id}
        assert client.post(FEEDBACK, json=judged, headers=headers).status_code == 201
    letters = sqlite_gateway.gateway.settings.data / "dead-letters.jsonl"
    add_letter(letters, {"id": ids[0], "choices": [CANARY]})
    add_letter(letters, {"id": others[0], "choices": ["another's"]})
    data = sqlite_gateway.gateway.settings.data
    assert files_with_canary(folder_of(sqlite_gateway))
    assert files_with_canary(data)

    for completion_id in ids:
        assert client.delete(f"{CHAT}/{completion_id}").json()["deleted"] is True

    assert files_with_canary(folder_of(sqlite_gateway)) == []
    assert files_with_canary(data) == []
    assert json.loads(letters.read_text())["id"] == others[0]
    with sqlite_gateway.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Answer)) == len(others)
        assert session.scalar(select(func.count()).select_from(IdempotentRequest)) == 0


def test_what_is_not_to_be_stored_leaves_no_text_anywhere(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client(sqlite_gateway.key("ana"))
    tool = {"type": "function", "function": {"name": CANARY, "parameters": {"type": "object"}}}
    completion_id = ask(
        client,
        CHAT,
        store=False,
        metadata={"about": CANARY},
        stop=[CANARY],
        tools=[tool],
        tool_choice="none",
        temperature=0.5,
    )
    ask(client, TEXT, store=False)
    letters = sqlite_gateway.gateway.settings.data / "dead-letters.jsonl"
    add_letter(letters, {"id": completion_id, "stored": False, "choices": [CANARY]})
    assert files_with_canary(folder_of(sqlite_gateway)) == []
    assert files_with_canary(letters.parent) == []
    with sqlite_gateway.database.read() as session:
        assert session.get_one(Answer, completion_id).sampling["temperature"] == 0.5
    assert client.delete(f"{CHAT}/{completion_id}").status_code == 200


def test_a_log_that_somebody_reads_is_emptied_afterwards(
    sqlite_database: Database, tmp_path: Path
) -> None:
    remains = Remains(sqlite_database, tmp_path / "letters")
    answer_id = add_answer(sqlite_database, "ana", prompt=CANARY)
    with sqlite_database.read() as reader:
        reader.scalar(select(func.count()).select_from(Answer))
        with sqlite_database.write() as session:
            delete_answer(session, session.get_one(Answer, answer_id))
        remains.forget([answer_id])
        assert remains._log_is_due
    remains.clear_log()
    assert not remains._log_is_due
    assert files_with_canary(tmp_path) == []


def test_the_sweep_removes_old_replies_and_letters_of_answers_that_are_gone(
    database: Database, tmp_path: Path
) -> None:
    letters = tmp_path / "letters.jsonl"
    there = add_answer(database, "ana")
    add_letter(letters, {"id": there})
    add_letter(letters, {"id": "deleted elsewhere"})
    with letters.open("a") as file:
        file.write("a person's note\n")
    old, young = (build_attempt("key_1", key, "POST", FEEDBACK, b"") for key in ("old", "young"))
    with database.write() as session:
        for one in (old, young):
            idempotency.begin(session, one)
            idempotency.keep(session, one, KeptReply(201, {"completion_id": there}))
        yesterday = now() - timedelta(hours=25)
        is_old = IdempotentRequest.key == "old"
        session.execute(update(IdempotentRequest).where(is_old).values(created_at=yesterday))
    Remains(database, letters).sweep()
    assert letters.read_text() == json.dumps({"id": there}) + "\na person's note\n"
    with database.read() as session:
        assert session.scalars(select(IdempotentRequest.key)).all() == ["young"]
        assert session.scalars(select(IdempotentSubject.key)).all() == ["young"]


@pytest.mark.parametrize("kept_first", [True, False])
def test_a_reply_goes_with_the_conversation_that_it_is_about(
    database: Database, kept_first: bool
) -> None:
    answer_id = add_answer(database, "ana")
    one = build_attempt("key_1", "k", "POST", FEEDBACK, b"")
    with database.write() as session:
        conversation_id = session.get_one(Answer, answer_id).conversation_id
        idempotency.begin(session, one)

    def keep() -> None:
        with database.write() as session:
            reply = KeptReply(201, {"conversation_id": conversation_id, "comment": CANARY})
            idempotency.keep(session, one, reply)

    def delete() -> None:
        with database.write() as session:
            gone = delete_answer(session, session.get_one(Answer, answer_id))
            assert gone == {answer_id, conversation_id}
            idempotency.forget(session, gone)

    for step in (keep, delete) if kept_first else (delete, keep):
        step()
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(IdempotentRequest)) == 0
        assert session.scalar(select(func.count()).select_from(Conversation)) == 0


def test_letters_that_come_while_others_are_removed_are_kept(tmp_path: Path) -> None:
    letters = tmp_path / "letters.jsonl"
    assert remove_letters(letters, lambda ids: ids) == 0
    for name in "abc":
        add_letter(letters, {"id": name})
    assert remove_letters(letters, lambda ids: ids - {"b"}) == 2
    add_letter(letters, {"id": "d"})
    assert [json.loads(line)["id"] for line in letters.read_text().splitlines()] == ["b", "d"]
    assert letters.stat().st_mode & 0o777 == 0o600


def test_half_a_letter_spoils_no_other_and_goes_with_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = tmp_path / "letters.jsonl"
    add_letter(letters, {"id": "a"})
    with monkeypatch.context() as full_disk:
        write = os.write

        def write_half(file: int, left: memoryview) -> int:
            full_disk.setattr(os, "write", refuse)
            return write(file, left[: len(left) // 2])

        def refuse(_file: int, _left: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        full_disk.setattr(os, "write", write_half)
        with pytest.raises(OSError, match="No space"):
            add_letter(letters, {"id": "b", "choices": [CANARY]})
    assert letters.read_text() == '{"id": "a"}\n'
    with letters.open("a") as killed:
        killed.write('{"id": "c", "choices": ["' + CANARY)
    add_letter(letters, {"id": "d"})
    assert remove_letters(letters, lambda ids: ids & {"c"}) == 1
    assert letters.read_text() == '{"id": "a"}\n{"id": "d"}\n'


def test_a_deletion_stands_where_the_log_cannot_be_emptied(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remains = Remains(sqlite_database, tmp_path / "letters")

    def refuse() -> bool:
        raise PoolTimeout("no connection is free")

    monkeypatch.setattr(sqlite_database, "truncate_log", refuse)
    remains.forget(["chatcmpl-1"])
    assert remains._log_is_due
