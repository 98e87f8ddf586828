"""Stored completions through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
from openai import OpenAI

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer


@contextmanager
def sdk(gateway: RunningGateway, key: str) -> Iterator[OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        OpenAI(base_url=f"{gateway.url}/v1", api_key=key, http_client=http) as client,
    ):
        yield client


def ask(client: OpenAI, content: str, **metadata: str) -> str:
    answer = client.chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": content}], metadata=metadata
    )
    return answer.id


def test_the_official_client_lists_reads_changes_and_deletes_what_it_stored(
    running_gateway: RunningGateway,
) -> None:
    with sdk(running_gateway, running_gateway.key("anna")) as client:
        ids = [ask(client, f"question {i}", topic="odd" if i % 2 else "even") for i in range(5)]
        assert [c.id for c in client.chat.completions.list()] == ids
        assert [c.id for c in client.chat.completions.list(order="desc", limit=2)] == ids[::-1]
        assert [c.id for c in client.chat.completions.list(limit=2)] == ids  # pages follow
        odd = client.chat.completions.list(metadata={"topic": "odd"})
        assert [c.id for c in odd] == ids[1::2]
        assert [c.id for c in client.chat.completions.list(model="assistant@0")] == ids
        assert list(client.chat.completions.list(model="other")) == []

        stored = client.chat.completions.retrieve(ids[0])
        assert stored.model == "assistant@0"
        assert stored.choices[0].message.content
        assert stored.usage is not None
        assert stored.usage.completion_tokens == 33
        messages = list(client.chat.completions.messages.list(ids[0]))
        assert [(m.role, m.content) for m in messages] == [("user", "question 0")]

        client.chat.completions.update(ids[0], metadata={"topic": "new"})
        assert [c.id for c in client.chat.completions.list(metadata={"topic": "new"})] == [ids[0]]
        assert client.chat.completions.delete(ids[0]).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(ids[0])
        assert [c.id for c in client.chat.completions.list()] == ids[1:]


def test_nobody_sees_or_touches_another_person_s_completions(
    running_gateway: RunningGateway,
) -> None:
    with sdk(running_gateway, running_gateway.key("anna")) as anna:
        mine = ask(anna, "secret")
        with sdk(running_gateway, running_gateway.key("bert")) as bert:
            assert list(bert.chat.completions.list()) == []
            for attempt in (
                lambda: bert.chat.completions.retrieve(mine),
                lambda: bert.chat.completions.update(mine, metadata={"a": "b"}),
                lambda: bert.chat.completions.delete(mine),
                lambda: bert.chat.completions.messages.list(mine),
                lambda: bert.chat.completions.list(after=mine),
            ):
                with pytest.raises(openai.NotFoundError):
                    attempt()
        assert anna.chat.completions.retrieve(mine).metadata == {}


def test_what_was_not_to_be_stored_is_not_there(sqlite_gateway: RunningGateway) -> None:
    with sdk(sqlite_gateway, sqlite_gateway.key("anna")) as client:
        answer = client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": "hi"}], store=False
        )
        text = client.completions.create(model="assistant", prompt="hi")
        for answer_id in (answer.id, text.id):
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.retrieve(answer_id)
        assert list(client.chat.completions.list()) == []


def test_parameters_out_of_bounds_are_400(sqlite_gateway: RunningGateway) -> None:
    client = sqlite_gateway.client(sqlite_gateway.key("anna"))
    for query in ("limit=0", "limit=101", "limit=x", "order=up"):
        reply = client.get(f"/v1/chat/completions?{query}")
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == query.partition("=")[0]


def test_a_message_that_was_sent_in_parts_is_shown_as_text_and_as_parts(
    sqlite_gateway: RunningGateway,
) -> None:
    """OpenAI's clients know `content` as a text, and the parts as `content_parts`."""
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "a tide?"}]
    with sdk(sqlite_gateway, sqlite_gateway.key("anna")) as client:
        answer = client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": parts}]
        )
        [message] = client.chat.completions.messages.list(answer.id)
    assert message.content == "What is\na tide?"
    assert [part.model_dump(exclude_none=True) for part in message.content_parts or ()] == parts


@pytest.mark.parametrize("pairs", [17, 200])
def test_more_filters_than_a_completion_has_pairs_are_refused(
    sqlite_gateway: RunningGateway, pairs: int
) -> None:
    client = sqlite_gateway.client()
    filters = {f"metadata[k{number}]": "v" for number in range(pairs)}
    reply = client.get("/v1/chat/completions", params=filters)
    assert reply.status_code == 400
    assert f"found {pairs} pairs" in reply.json()["error"]["message"]
    fewer = dict(list(filters.items())[:16])
    assert client.get("/v1/chat/completions", params=fewer).json()["data"] == []


@pytest.mark.parametrize("name", ["metadata", "metadata[a", "metadata[a][b]"])
def test_a_filter_of_another_form_is_refused(sqlite_gateway: RunningGateway, name: str) -> None:
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    reply = anna.get("/v1/chat/completions", params={name: "x"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "metadata")
    assert anna.get("/v1/chat/completions", params={"metadata[a]": "x"}).status_code == 200


def test_a_curator_reads_what_others_got_and_changes_none_of_it(
    sqlite_gateway: RunningGateway,
) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    curator = sqlite_gateway.client(sqlite_gateway.key("cu", "chat", "feedback", "curate"))

    assert curator.get(f"/v1/chat/completions/{answer}").status_code == 200
    assert (
        curator.post(f"/v1/chat/completions/{answer}", json={"metadata": {"a": "b"}}).status_code
        == 404
    )
    assert curator.delete(f"/v1/chat/completions/{answer}").status_code == 404
    assert curator.get(f"/v1/chat/completions/{answer}").json()["metadata"] == {}


def test_an_administrator_who_deletes_somebody_elses_answer_is_written_down(
    sqlite_gateway: RunningGateway,
) -> None:
    of_anna, own = (add_answer(sqlite_gateway.database, user) for user in ("anna", "admin"))
    admin = sqlite_gateway.client()

    assert (
        admin.post(f"/v1/chat/completions/{of_anna}", json={"metadata": {"a": "b"}}).status_code
        == 200
    )
    assert admin.delete(f"/v1/chat/completions/{of_anna}").status_code == 200
    assert admin.delete(f"/v1/chat/completions/{own}").status_code == 200

    entries = admin.get("/admin/audit").json()["data"]
    assert [(entry["action"], entry["subject"]) for entry in entries] == [
        ("answer_deleted", of_anna),
        ("answer_changed", of_anna),
    ]
