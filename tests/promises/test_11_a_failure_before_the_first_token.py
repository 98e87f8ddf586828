"""Promise 11: before the first token a failure is retried once elsewhere; after it, never."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from feedback.db import Database
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import MAX_LORAS, start_gateway
from tests.promise_fixtures import Figures
from tests.promises.scale import scaled

pytestmark = pytest.mark.promises
CHAT = "/v1/chat/completions"


def test_each_request_is_asked_once_more_at_most_under_the_same_release(
    sqlite_database: Database, tmp_path: Path, figures: Figures
) -> None:
    before = [Faults(hangs_up=True), Faults(error_status=500), Faults(dies_after_tokens=0)]
    after = [Faults(dies_after_tokens=1), Faults(errs_after_tokens=1)]
    with (
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as bad,
        FakeEngine(api_key="secret", max_loras=MAX_LORAS) as good,
        start_gateway(sqlite_database, tmp_path / "data", [bad.address, good.address]) as gateway,
    ):
        gateway.reconcile()
        candidate = gateway.candidate(1)
        gateway.promote(candidate.name)
        client = gateway.client(gateway.key("anna"))

        def ask(faults: Faults) -> tuple[str, Counter[str], set[str]]:
            bad.faults = Faults()
            gateway.reconcile()
            seen = len(bad.requests), len(good.requests)
            bad.faults = faults
            body = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}
            text = client.post(CHAT, json={**body, "stream": True}).text
            asked = [
                (name, request.body["model"])
                for name, engine, start in (("bad", bad, seen[0]), ("good", good, seen[1]))
                for request in list(engine.requests)[start:]
                if request.path == CHAT
            ]
            return text, Counter(name for name, _ in asked), {model for _, model in asked}

        for _ in range(scaled(40)):
            for faults in before:
                text, asked, models = ask(faults)
                assert text.endswith("data: [DONE]\n\n")
                assert candidate.signature in text
                assert asked == {"bad": 1, "good": 1}
                assert models == {candidate.engine_name}
            for faults in after:
                text, asked, _ = ask(faults)
                assert '"error"' in text.split("\n\n")[-2]
                assert "[DONE]" not in text
                assert asked == {"bad": 1}
    figures(failures=5 * scaled(40), retried_after_the_first_token=0)
