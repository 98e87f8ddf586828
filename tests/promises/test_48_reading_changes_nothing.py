"""Promise 48: who reads what everybody said changes none of it, and what reading adds is audited.

Every route is called, with bodies that are right, by somebody who may curate and by somebody who
chats and judges besides; all ids are another person's.
"""

from __future__ import annotations

from typing import Any

import pytest

from feedback.tables import AuditEntry
from server.access.scopes import ROUTES, Scope
from tests.everything import BODIES, add_everything, call, list_rows
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.rows import add_answer

pytestmark = pytest.mark.promises

SAID = (
    "answers",
    "answer_texts",
    "answer_metadata",
    "conversations",
    "judgements",
    "judgement_revisions",
    "comparisons",
    "comparison_revisions",
)
OWN = {Scope.CHAT, Scope.FEEDBACK}


def ask_everything(running: RunningGateway, ids: dict[str, str], *scopes: str) -> int:
    """Call every route with a key of these scopes, all of them a curator's own; how many."""
    client, asked = running.client(running.key("cu", *scopes)), 0
    for method, template in ROUTES:
        release = template.startswith("/admin/releases")
        given = {**ids, "token": "slot_1", "name": ids["release"] if release else ids["name"]}
        path = template.replace(":path", "").format_map(given)
        build = BODIES.get((method, template))
        bodies: list[dict[str, Any] | None] = list(build(ids)) if build else [None]
        for body in bodies:
            status = call(client, method, path, body).status_code
            assert status < 500, (method, path)
            asked += 1
    return asked


@pytest.mark.parametrize("scopes", [("curate",), ("curate", "chat", "feedback")])
def test_a_curator_changes_nothing_that_others_said(
    sqlite_gateway: RunningGateway, scopes: tuple[str, ...], figures: Figures
) -> None:
    ids = add_everything(sqlite_gateway, "poet", "bea")
    pair = [add_answer(sqlite_gateway.database, "bea", text=text) for text in ("One.", "Two.")]
    bea = sqlite_gateway.client(sqlite_gateway.key("bea"))
    compared = {"completion_ids": pair, "preferred": "a"}
    assert bea.post("/v1/comparisons", json=compared).status_code == 201
    sqlite_gateway.client(sqlite_gateway.key("cu", *scopes)).get("/admin/deployments")
    before = list_rows(sqlite_gateway.database)

    keys = [*before["keys"]]
    asked = ask_everything(sqlite_gateway, ids, *scopes)

    after = list_rows(sqlite_gateway.database)
    assert asked > len(ROUTES)
    assert len(after["keys"]) == len(keys) + 1  # the one that asked
    assert set(keys) <= set(after["keys"])
    assert after["people"] == before["people"]
    for table in SAID:
        assert set(before[table]) <= set(after[table]), table
        if not OWN & {*scopes}:
            assert after[table] == before[table], table
    for table in ("judgements", "comparisons"):
        assert after[table] == before[table], table
    figures(requests=asked, changed=0)


def test_what_a_curator_adds_stands_in_the_audit_log(
    sqlite_gateway: RunningGateway, figures: Figures
) -> None:
    ids = add_everything(sqlite_gateway, "poet", "bea")
    before = list_rows(sqlite_gateway.database)

    asked = ask_everything(sqlite_gateway, ids, "curate")

    after = list_rows(sqlite_gateway.database)
    added = [row.split("'")[1] for row in set(after["datasets"]) - set(before["datasets"])]
    with sqlite_gateway.database.read() as session:
        entries = session.query(AuditEntry).filter(AuditEntry.actor == "cu").all()
    assert len(added) == 1
    assert [(entry.action, entry.subject) for entry in entries] == [("dataset_requested", added[0])]
    changed = {table for table in after if set(before[table]) != set(after[table])}
    assert changed <= {"audit", "datasets", "jobs", "job_events", "keys", "people"}
    figures(requests=asked, added=len(added), audited=len(entries))
