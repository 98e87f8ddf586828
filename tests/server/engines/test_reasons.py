"""What everybody may read of an engine."""

from __future__ import annotations

import pytest

from server.engines.base import EngineRefused
from server.engines.reasons import in_public
from tests.engine_world import World

pytestmark = pytest.mark.anyio


async def test_what_everybody_may_read_of_an_engine_names_no_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = "[Errno 2] '/srv/models/secret/adapter.bin' on gpu-7.internal via http://10.0.0.7:8001/"
    world = World()

    async def list_models() -> dict[str, str]:
        raise EngineRefused(500, words)

    world.engines[0].list_models = list_models  # type: ignore[method-assign] - this one alone
    await world.conductor.reconcile()
    assert world.view.reason == "engine answered 500: [Errno 2] '…' on … via …"
    assert any(words in str(vars(record).get("reason")) for record in caplog.records)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("<html><head><title>502 Bad Gateway</title></head>", "a page of HTML (502 Bad Gateway)"),
        (
            "/metrics has no start; /v1/models answered",
            "/metrics has no start; /v1/models answered",
        ),
        ("x" * 5000, "x" * 200 + "…"),
    ],
)
async def test_reasons_are_short(words: str, told: str) -> None:
    assert in_public(words) == told
