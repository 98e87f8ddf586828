"""Promise 29: hostile bodies are refused in less than 100 ms, and the memory stays flat."""

from __future__ import annotations

import json
import time
import tracemalloc

import httpx
import pytest

from feedback.errors import AppError
from server.chat.request import parse_chat
from server.http.bodies import parse_body, refuse_nul
from tests.gateway_fixtures import RunningGateway
from tests.promise_fixtures import Figures
from tests.promises.hostile.bodies import CONTENTS, MIB
from tests.promises.hostile.sending import CHAT, TEXT
from tests.promises.scale import is_full, scaled

pytestmark = pytest.mark.promises

MOST_SECONDS = 0.1


def test_hostile_bodies_are_refused_in_time(
    sqlite_gateway: RunningGateway, figures: Figures
) -> None:
    client = sqlite_gateway.client()
    headers = {"content-type": "application/json"}
    slowest, refused = ("", 0.0), 0
    for name, content in CONTENTS.items():
        for path in (CHAT, TEXT, "/v1/feedback"):
            seconds = []
            for _ in range(3):  # the machine may be busy with something else: the best counts
                began = time.perf_counter()
                reply = client.post(path, content=content, headers=headers)
                seconds.append(time.perf_counter() - began)
                assert 400 <= reply.status_code < 500, (name, path, reply.status_code)
                assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
                refused += 1
            slowest = max(slowest, (name, min(seconds)), key=lambda found: found[1])
            if is_full():  # a busy machine says nothing about it
                assert min(seconds) < MOST_SECONDS, (name, path, seconds)
    with httpx.Client(base_url=sqlite_gateway.url, trust_env=False) as nobody:
        reply = nobody.get("/healthz", headers={"x-long": "a" * 64 * 1024})
        assert (reply.status_code, reply.json()["error"]["code"]) == (431, "headers_too_large")
    figures(refused=refused, slowest_ms=round(slowest[1] * 1000), slowest=slowest[0])


def test_memory_stays_flat(figures: Figures) -> None:
    def read(content: bytes) -> None:
        body = parse_body(content, max_bytes=MIB)
        refuse_nul(content)
        parse_chat(body, max_choices=8, strict=False)

    def refuse_all() -> None:
        for content in CONTENTS.values():
            with pytest.raises(AppError):
                read(content)

    refuse_all()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(scaled(40)):
            refuse_all()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < MIB
    assert peak - before < 64 * MIB
    figures(kept_kib=(after - before) // 1024, peak_mib=(peak - before) // MIB)


def test_what_is_within_the_bounds_passes(sqlite_gateway: RunningGateway) -> None:
    nested = json.loads("[" * 28 + "]" * 28)
    body = {
        "model": "assistant",
        "messages": [{"role": "user", "content": r"a \u0000 in words, a 💡, [[[[" + "[" * 100}],
        "seed": 2**63 - 1,
        "metadata": {"long": "9" * 500},
        "x_nested": nested,
    }
    reply = sqlite_gateway.client().post(CHAT, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-burnish-ignored"] == "x_nested"
