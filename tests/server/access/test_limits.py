"""What a key may ask for, and what it is told."""

from __future__ import annotations

import threading
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.errors import RateLimited
from server.access.keyring import KeyView
from server.access.limits import MOST_TOKENS, Account, LimitBook, Limits, duration
from server.access.tokens import Grant
from tests.fake_engine import FakeEngine, Faults
from tests.gateway_fixtures import RunningGateway
from tests.rows import add_answer

CHAT = "/v1/chat/completions"
HI = {"model": "assistant", "messages": [{"role": "user", "content": "hi"}]}


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def account(clock: Clock, **limits: int) -> Account:
    return Account(Limits(**limits), clock)


def key(scope: str = "chat", **limits: int | None) -> KeyView:
    return KeyView("key_1", "0" * 64, "anna", frozenset({scope}), None, False, limits=limits)


def test_requests_beyond_the_limit_wait_until_the_bucket_has_one() -> None:
    clock = Clock()
    used = account(clock, requests_per_minute=2)
    for _ in range(2):
        used.admit(with_tokens=True)
    with pytest.raises(RateLimited, match=r"2 requests per minute.* in 30s") as refused:
        used.admit(with_tokens=True)
    assert refused.value.retry_after_seconds == 30
    clock.at += 29.9
    with pytest.raises(RateLimited):
        used.admit(with_tokens=True)
    clock.at += 0.1
    used.admit(with_tokens=True)


def test_tokens_may_be_overdrawn_by_one_answer_and_are_paid_back() -> None:
    clock = Clock()
    used = account(clock, tokens_per_minute=60)
    used.admit(with_tokens=True).charge(150)
    assert used.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited, match="60 tokens per minute") as refused:
        used.admit(with_tokens=True)
    assert refused.value.retry_after_seconds == 90
    used.admit(with_tokens=False)  # a request that uses none
    clock.at += 90
    used.admit(with_tokens=True)


def test_a_request_that_ended_makes_room_for_another() -> None:
    used = account(Clock(), concurrent_requests=1)
    first = used.admit(with_tokens=True)
    with pytest.raises(RateLimited, match="1 request at once") as refused:
        used.admit(with_tokens=True)
    assert refused.value.retry_after_seconds == 1
    first.end()
    used.admit(with_tokens=True)


def test_headers_are_openai_s_and_only_of_limits_that_are_set() -> None:
    clock = Clock()
    used = account(clock, requests_per_minute=60)
    used.admit(with_tokens=True)
    assert used.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (360, "6m0s"), (3661, "1h1m1s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=60), st.integers(1, 50))
def test_no_minute_lets_more_than_the_limit_and_one_bucket_in(
    steps: list[tuple[float, bool]], per_minute: int
) -> None:
    clock = Clock()
    used = account(clock, requests_per_minute=per_minute)
    admitted: list[float] = []
    for seconds, asks in steps:
        clock.at += seconds
        if asks:
            try:
                used.admit(with_tokens=False).end()
            except RateLimited:
                continue
            admitted.append(clock.at)
    for at in admitted:
        assert sum(at <= other < at + 60 for other in admitted) <= 2 * per_minute
    assert used.running == 0


def test_a_key_s_own_limits_stand_in_for_the_defaults_and_null_lifts_one() -> None:
    book = LimitBook(Limits(requests_per_minute=10, concurrent_requests=3))
    found = book.account(key(requests_per_minute=5, concurrent_requests=None))
    assert found is not None
    assert found.limits == Limits(requests_per_minute=5)
    assert book.account(key(requests_per_minute=5, concurrent_requests=None)) is found
    assert book.account(key(requests_per_minute=None, concurrent_requests=None)) is None
    assert book.account(key("internal")) is None
    assert LimitBook(Limits()).account(key()) is None


def test_over_the_limit_is_429_with_what_to_do_and_when(running_gateway: RunningGateway) -> None:
    limits = {"requests_per_minute": 2, "tokens_per_minute": 1000}
    made = running_gateway.client().post(
        "/admin/keys", json={"user": "anna", "scopes": ["chat"], "limits": limits}
    )
    assert made.json()["limits"] == limits
    anna = running_gateway.client(made.json()["key"])

    answered = anna.post(CHAT, json=HI)
    used = answered.json()["usage"]["total_tokens"]
    listed = anna.get("/v1/models")  # other routes count as requests
    refused = anna.post(CHAT, json=HI)

    assert answered.headers["x-ratelimit-limit-requests"] == "2"
    assert answered.headers["x-ratelimit-remaining-requests"] == "1"
    assert answered.headers["x-ratelimit-remaining-tokens"] == "1000"
    left = int(listed.headers["x-ratelimit-remaining-tokens"])
    assert 1000 - used <= left <= 1000 - used + 100  # it fills meanwhile
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "2 requests per minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-content-type-options"] == "nosniff"
    assert "x-ratelimit-limit-requests" not in running_gateway.client().get("/v1/models").headers


def test_a_running_stream_counts_until_it_ends_or_its_client_has_gone(
    sqlite_gateway: RunningGateway, gateway_engine: FakeEngine
) -> None:
    gateway_engine.faults = Faults(endless=True, token_seconds=0.01)
    limits = {"concurrent_requests": 1, "tokens_per_minute": 100}
    token = sqlite_gateway.key("anna", "chat", limits=limits)
    anna = sqlite_gateway.client(token)
    account = sqlite_gateway.gateway.limits.account(
        sqlite_gateway.gateway.directory.keyring.authenticate(f"Bearer {token}")
    )
    assert account is not None
    ended = threading.Event()

    with anna.stream("POST", CHAT, json={**HI, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        refused = anna.get("/v1/models")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert account.running == 1
    for _ in range(500):
        if account.running == 0:
            break
        ended.wait(0.01)
    assert anna.get("/v1/models").status_code == 200
    # Nobody counted the tokens of what was broken off; it was not free.
    assert int(account.headers()["x-ratelimit-remaining-tokens"]) < 100


def test_without_a_key_nothing_is_counted(sqlite_gateway: RunningGateway) -> None:
    sqlite_gateway.gateway.limits = LimitBook(Limits(requests_per_minute=1))
    with httpx.Client(base_url=sqlite_gateway.url, trust_env=False) as nobody:
        assert [nobody.get("/healthz").status_code for _ in range(3)] == [200] * 3
        assert [nobody.get("/v1/models").status_code for _ in range(3)] == [401] * 3
    worker = sqlite_gateway.client(sqlite_gateway.worker_key)
    assert [worker.post(CHAT, json=HI).status_code for _ in range(2)] == [200] * 2


def test_tokens_of_one_answer_and_person_share_a_limit_and_the_key_s_is_untouched() -> None:
    clock = Clock()
    book = LimitBook(Limits(requests_per_minute=1), clock)

    def of(answer: str, person: str = "person_1") -> Account:
        grant = Grant(answer, person, "key_1", 2**40)
        found = book.account(replace(key("feedback"), grant=grant))
        assert found is not None
        return found

    for _ in range(30):
        of("chatcmpl-1").admit(with_tokens=False).end()
    with pytest.raises(RateLimited, match="a feedback token may use 30 requests per minute"):
        of("chatcmpl-1").admit(with_tokens=False)
    for other in (of("chatcmpl-2"), of("chatcmpl-1", "person_2"), book.account(key())):
        assert other is not None
        other.admit(with_tokens=False).end()


def test_of_feedback_tokens_a_bounded_number_is_counted() -> None:
    book = LimitBook(Limits(), Clock())
    for number in range(MOST_TOKENS + 5):
        book.account(replace(key(), grant=Grant(f"chatcmpl-{number}", "p", "key_1", 2**40)))
    assert len(book._tokens) == MOST_TOKENS
    assert ("chatcmpl-4", "p") not in book._tokens


def test_whoever_has_a_token_cannot_stop_its_application(sqlite_gateway: RunningGateway) -> None:
    answer = add_answer(sqlite_gateway.database, "anna")
    limits = {"requests_per_minute": 5}
    anna = sqlite_gateway.client(sqlite_gateway.key("anna", "chat", "feedback", limits=limits))
    made = anna.post(
        "/v1/feedback/tokens", json={"completion_id": answer, "expires_in_seconds": 60}
    )
    browser = sqlite_gateway.client(made.json()["token"])

    statuses = [404]
    while statuses[-1] == 404 and len(statuses) < 300:  # the bucket fills again as time passes
        statuses.append(browser.get("/v1/feedback/fb_none").status_code)

    assert len(statuses) > 31
    assert statuses[-1] == 429
    assert anna.get("/v1/models").headers["x-ratelimit-remaining-requests"] == "3"
