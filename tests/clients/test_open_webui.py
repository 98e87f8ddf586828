"""Open WebUI, from its wheel and with its defaults, in front of a running Burnish.

It offers tools of its own with every chat, and the engine here has no parser for them, as the
bundled model has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select

from feedback.tables import Answer, AnswerKind, AnswerStatus, AnswerText, Conversation, Person
from tests.clients.conftest import run_program
from tests.clients.environments import Client
from tests.clients.service import start_gateway_alone
from tests.fake_engine import BASE, FakeEngine, Faults, fake_answer
from tests.gateway_fixtures import RunningGateway

pytestmark = pytest.mark.clients

QUESTION, FURTHER = "What is a tide?", "And what is a spring tide?"
PROGRAM_SECONDS = 480.0


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(model="tiny", api_key="secret") as engine:
        engine.faults = Faults(lacks_tool_parser=True)
        yield engine


@pytest.fixture(scope="module")
def gateway(
    engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with start_gateway_alone(tmp_path_factory.mktemp("open-webui") / "burnish", engine) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def found(open_webui: Client, gateway: RunningGateway, plain_environment: dict[str, str]) -> Any:
    """What happened from the first start to the end of a chat of two turns."""
    key = gateway.key("open-webui", "chat", end_users=True)
    environment = {
        **plain_environment,
        "OPENAI_BASE_URL": f"{gateway.url}/v1",
        "OPENAI_API_KEY": key,
    }
    report = run_program(open_webui, environment, "first_start", seconds=PROGRAM_SECONDS)
    return report["first_start"]


def rows(gateway: RunningGateway, kind: AnswerKind) -> list[tuple[Answer, AnswerText]]:
    with gateway.database.read() as session:
        query = select(Answer, AnswerText).join(AnswerText).where(Answer.kind == kind)
        return [(row, text) for row, text in session.execute(query.order_by(Answer.id))]


def test_the_first_start_lists_the_deployment_and_the_base(found: dict[str, Any]) -> None:
    assert found["onboarding"] is True
    assert found["user"]["role"] == "admin"
    assert {"assistant", "tiny"} <= set(found["models"])


def test_a_chat_of_two_turns_is_answered_though_tools_are_offered_that_nobody_can_call(
    found: dict[str, Any], gateway: RunningGateway, engine: FakeEngine
) -> None:
    recorded = rows(gateway, AnswerKind.CHAT)
    assert len(recorded) == 2
    for said, (row, text) in zip(found["answers"], recorded, strict=True):
        assert row.status == AnswerStatus.COMPLETE
        assert said == fake_answer(BASE, text.messages)
    asked = [request.body for request in engine.requests if "chat/completions" in request.path]
    # It was asked whether it calls tools: none but Open WebUI's chats have any.
    assert [body for body in asked if "tools" in body and body["max_tokens"] != 1] == []
    assert any("tools" in body for body in asked)
    assert {text.tools for _, text in recorded} == {None}


def test_the_person_and_the_conversation_are_open_webuis(
    found: dict[str, Any], gateway: RunningGateway
) -> None:
    [first, second] = rows(gateway, AnswerKind.CHAT)
    with gateway.database.read() as session:
        people = {session.get_one(Person, row.person_id).end_user for row, _ in (first, second)}
        conversation = session.get_one(Conversation, first[0].conversation_id)
    assert people == {found["user"]["id"]}
    assert conversation.external_id == found["chat"]
    assert second[0].conversation_id == conversation.id
    assert second[0].parent_id == first[0].id
    turns = [message["content"] for message in second[1].messages if message["role"] == "user"]
    assert turns == [QUESTION, FURTHER]


def test_its_own_calls_are_tasks_outside_of_the_conversation(
    found: dict[str, Any], gateway: RunningGateway
) -> None:
    tasks = rows(gateway, AnswerKind.TASK)
    asked = Counter(
        word
        for _, text in tasks
        for word in ("title", "tags", "follow-up")
        if word in text.messages[-1]["content"].partition("\n###")[0]
    )
    assert asked["title"] == asked["tags"] == 1
    [chat, *_] = rows(gateway, AnswerKind.CHAT)
    for row, _ in tasks:
        assert (row.status, row.trainable) == (AnswerStatus.COMPLETE, False)
        assert row.conversation_id != chat[0].conversation_id
        assert row.person_id == chat[0].person_id
    assert found["title"]
