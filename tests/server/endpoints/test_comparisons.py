"""Comparisons through the API."""

from __future__ import annotations

from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer


def test_a_comparison_reads_in_the_order_it_was_made(running_gateway: RunningGateway) -> None:
    one = add_answer(running_gateway.database, "anna", text="A bird.")
    two = add_answer(running_gateway.database, "anna", text="A fish.")
    anna = running_gateway.client(running_gateway.key("anna"))

    forth = anna.post("/v1/comparisons", json={"completion_ids": [one, two], "preferred": "a"})
    back = anna.post("/v1/comparisons", json={"completion_ids": [two, one], "preferred": "b"})

    assert (forth.status_code, back.status_code) == (201, 200)
    assert forth.json()["id"] == back.json()["id"]
    assert (forth.json()["completion_ids"], forth.json()["preferred"]) == ([one, two], "a")
    assert (back.json()["completion_ids"], back.json()["preferred"]) == ([two, one], "b")
    assert forth.json()["teaches"] == "preference"
    assert forth.json()["user"] == "anna"


def test_an_application_compares_for_its_end_users(sqlite_gateway: RunningGateway) -> None:
    pair = [
        add_answer(sqlite_gateway.database, "shop", end_user="bea", text=text)
        for text in ("A bird.", "A fish.")
    ]
    shop = sqlite_gateway.client(sqlite_gateway.key("shop", end_users=True))
    body = {"completion_ids": pair, "preferred": "both_bad"}

    assert shop.post("/v1/comparisons", json=body).json()["user"] == "bea"
    assert shop.post("/v1/comparisons", json={**body, "user": "carl"}).json()["user"] == "carl"


def test_what_is_no_comparison_is_refused(sqlite_gateway: RunningGateway) -> None:
    pair = [add_answer(sqlite_gateway.database, "anna", text=text) for text in ("A", "B")]
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    refused: list[tuple[dict[str, object], str]] = [
        ({"preferred": "left"}, "preferred"),
        ({"preferred": "a", "completion_ids": ["x"]}, "completion_ids.1"),
        ({"preferred": "a", "winner": "a"}, "winner"),
        ({}, "preferred"),
    ]
    for change, param in refused:
        reply = anna.post("/v1/comparisons", json={"completion_ids": pair, **change})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_answers_to_different_messages_are_not_compared(sqlite_gateway: RunningGateway) -> None:
    pair = [add_answer(sqlite_gateway.database, "anna", prompt=prompt) for prompt in ("A?", "B?")]
    anna = sqlite_gateway.client(sqlite_gateway.key("anna"))
    reply = anna.post("/v1/comparisons", json={"completion_ids": pair, "preferred": "a"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "completion_ids"
