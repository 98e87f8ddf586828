"""Promise 3: an answer is recorded under the release that made it, whatever is promoted meanwhile.

The fake engine signs what it says with a hash of the weights in use. `test_04_…` asks the same of
two gateways over three engines.
"""

from __future__ import annotations

import pytest
from sqlalchemy import select

from feedback.tables import Answer, AnswerText
from tests.fake_engine import BASE, FakeEngine, Faults
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled
from tests.promises.traffic import Traffic

pytestmark = pytest.mark.promises


def test_every_row_has_the_release_whose_signature_its_text_bears(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine, figures: Figures
) -> None:
    promotions, requests = scaled(50), scaled(5_000)
    gateway_engine.faults = Faults(token_seconds=0.0005)
    candidates = [sqlite_gateway.candidate(seed) for seed in range(1, 5)]
    traffic = Traffic([sqlite_gateway.url], sqlite_gateway.key("anna"))
    with traffic.running():
        for number in range(promotions):
            traffic.wait_for(requests // (promotions + 1))
            sqlite_gateway.promote(candidates[number % len(candidates)].name)
        traffic.wait_for(requests // (promotions + 1))
    assert traffic.errors == []
    signatures = {"assistant@0": BASE, **{c.name: c.signature for c in candidates}}
    with sqlite_gateway.database.read() as session:
        rows = session.execute(
            select(Answer.release, Answer.generation, AnswerText.choices).join(AnswerText)
        ).all()
    assert len(rows) == len(traffic.answers)
    for release, generation, choices in rows:
        assert choices is not None
        assert choices[0]["message"]["content"].split()[0] == signatures[release]
        made_by = "assistant@0" if not generation else candidates[(generation - 1) % 4].name
        assert release == made_by
    assert {generation for _, generation, _ in rows} == set(range(promotions + 1))
    figures(requests=len(rows), promotions=promotions, mismatches=0)
