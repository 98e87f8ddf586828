"""What a caller is told of an engine's failure."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI
from typing_extensions import TypedDict

from feedback.errors import BadRequest, NotReady
from server.errors import (
    EngineFault,
    NotLoaded,
    add_error_handlers,
    envelope_of,
    event_of,
    fault_of_engine,
    headers_of,
)
from server.logs import JsonFormatter

NAMES = {"assistant-1-abcd": "assistant@1"}


def said(message: str, param: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "param": param, "code": 400}}).encode()


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (400, BadRequest, 400),
        (422, BadRequest, 400),
        (401, EngineFault, 502),  # the gateway's key, not the caller's
        (404, NotLoaded, 503),
        (429, EngineFault, 502),
        (500, EngineFault, 502),
        (503, EngineFault, 502),
    ],
)
def test_the_caller_is_blamed_for_a_bad_request_alone(
    status: int, kind: type[Exception], told: int
) -> None:
    error = fault_of_engine(status, said("no"), names=NAMES)
    assert type(error) is kind
    assert error.status == told


def test_an_engine_s_words_name_the_public_model_and_its_code_is_no_number() -> None:
    error = fault_of_engine(400, said("'assistant-1-abcd' takes less", "max_tokens"), names=NAMES)
    assert envelope_of(error) == {
        "error": {
            "message": "'assistant@1' takes less",
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": None,
        }
    }


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error":"text"}', b'{"detail":"x"}'])
def test_an_engine_that_says_nothing_useful_is_an_error_all_the_same(body: bytes) -> None:
    assert "no reason" in fault_of_engine(500, body, names=NAMES).message


def test_a_prompt_that_is_too_long_has_openais_code() -> None:
    words = "This model's maximum context length is 8 tokens. However, your prompt contains 9"
    assert fault_of_engine(400, said(words), names=NAMES).code == "context_length_exceeded"
    assert fault_of_engine(400, said("n must be 1"), names=NAMES).code is None


def test_an_error_as_an_event_is_one_line_and_try_later_says_when() -> None:
    error = NotReady("line\nbreak", retry_after_seconds=7)
    event = event_of(error)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert headers_of(error) == {"retry-after": "7"}


def test_a_reply_that_breaks_its_own_form_is_a_fault_whose_log_has_no_values(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    add_error_handlers(app)

    @app.get("/broken", response_model=Form)
    def get_broken() -> dict[str, str]:
        return {"count": "what somebody wrote"}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/broken")

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    (record,) = [record for record in caplog.records if hasattr(record, "action")]
    assert (record.action, record.route) == ("reply_broken", "/broken")
    assert record.where == ["count: int_parsing"]
    assert "somebody" not in JsonFormatter().format(record)


class Form(TypedDict):
    count: int
