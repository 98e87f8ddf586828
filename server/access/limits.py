"""How much a key may ask for: requests and tokens per minute, and requests that run at once.

Owns: the buckets, their words and headers (OpenAI's names and formats). Each gateway counts for
itself, in memory: what was counted is gone after a restart. Does not own: when they are applied
(`middleware.py`), which key a request has (`callers.py`), how many tokens an answer took
(`chat/relay.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from feedback.errors import RateLimited
from server.access.keyring import KeyView
from server.access.scopes import Scope as KeyScope
from server.access.tokens import Grant

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may do; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def overridden(self, by: Mapping[str, int | None]) -> Limits:
        """With a key's own limits in the place of these; a None in `by` lifts one."""
        return Limits(
            requests_per_minute=by.get("requests_per_minute", self.requests_per_minute),
            tokens_per_minute=by.get("tokens_per_minute", self.tokens_per_minute),
            concurrent_requests=by.get("concurrent_requests", self.concurrent_requests),
        )


_UNLIMITED = Limits()

OF_A_TOKEN = Limits(requests_per_minute=30, concurrent_requests=4)
"""What all feedback tokens of one answer and person may do together: one page's clicks."""

MOST_TOKENS = 10_000  #: of which a gateway counts; those that were silent longest begin anew


class Bucket:
    """Holds up to `per_minute`, and fills evenly at that rate. It may be overdrawn."""

    def __init__(self, per_minute: int, at: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = at

    def level(self, at: float) -> float:
        """What it holds at that moment of the clock, in seconds."""
        self._level = min(self.per_minute, self._level + (at - self._at) * self.per_minute / 60)
        self._at = at
        return self._level

    def take(self, amount: float, at: float) -> None:
        self._level = self.level(at) - amount

    def seconds_until(self, level: float, at: float) -> float:
        """How long until it holds `level`; 0 when it does."""
        return max(0.0, (level - self.level(at)) * 60 / self.per_minute)


class Account:
    """What one key has used."""

    def __init__(self, limits: Limits, clock: Clock, *, whose: str = "this key") -> None:
        self.limits = limits
        self._whose = whose
        self._clock = clock
        self.running = 0
        at = clock()
        self.requests = _bucket(limits.requests_per_minute, at)
        self.tokens = _bucket(limits.tokens_per_minute, at)

    def admit(self, *, with_tokens: bool) -> Admission:
        """Count a request in; `with_tokens` when it will use some. Raises RateLimited."""
        at, limits = self._clock(), self.limits
        most = limits.concurrent_requests
        if most is not None and self.running >= most:
            raise RateLimited(
                f"{self._whose} may run {most} {'request' if most == 1 else 'requests'} at once, "
                "and no more; try again in 1s, or when one has ended",
                retry_after_seconds=1,
            )
        if self.requests is not None and self.requests.level(at) < 1:
            raise self._used_up("requests", self.requests, self.requests.seconds_until(1, at))
        if with_tokens and self.tokens is not None and self.tokens.level(at) < 0:
            raise self._used_up("tokens", self.tokens, self.tokens.seconds_until(0, at))
        if self.requests is not None:
            self.requests.take(1, at)
        self.running += 1
        return Admission(self)

    def charge(self, tokens: int) -> None:
        if self.tokens is not None:
            self.tokens.take(tokens, self._clock())

    def _used_up(self, what: str, bucket: Bucket, seconds: float) -> RateLimited:
        return RateLimited(
            f"{self._whose} may use {bucket.per_minute} {what} per minute, and they are used up; "
            f"try again in {duration(seconds)}",
            retry_after_seconds=max(1, math.ceil(seconds)),
        )

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…` of the limits that are set."""
        at = self._clock()
        found: dict[str, str] = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                left, full = bucket.level(at), bucket.seconds_until(bucket.per_minute, at)
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left)))
                found[f"x-ratelimit-reset-{name}"] = duration(full)
        return found


class Admission:
    """A request that was let in; it is let out once."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def charge(self, tokens: int) -> None:
        """Take what an answer used, prompt and completion."""
        self._account.charge(tokens)

    def end(self) -> None:
        self._account.running -= 1


class LimitBook:
    """The accounts of all keys that have a limit."""

    def __init__(self, defaults: Limits, clock: Clock = time.monotonic) -> None:
        self._defaults = defaults
        self._has_no_defaults = defaults == _UNLIMITED
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._tokens: dict[tuple[str, str], Account] = {}  #: the one used last stands last

    def account(self, key: KeyView) -> Account | None:
        """Where the key's use is counted; None for a key without limits, and for the worker.

        A feedback token takes nothing from the key that made it: browsers send it, and whoever
        has one must not be able to stop its application.
        """
        if key.grant is not None:
            return self._of_token(key.grant)
        if KeyScope.INTERNAL in key.scopes or (self._has_no_defaults and not key.limits):
            return None
        limits = self._defaults.overridden(key.limits)
        if limits == _UNLIMITED:
            return None
        found = self._accounts.get(key.id)
        if found is None or found.limits != limits:
            found = self._accounts[key.id] = Account(limits, self._clock)
        return found

    def _of_token(self, grant: Grant) -> Account:
        name = (grant.answer_id, grant.person_id)
        found = self._tokens.pop(name, None) or Account(
            OF_A_TOKEN, self._clock, whose="a feedback token"
        )
        self._tokens[name] = found
        if len(self._tokens) > MOST_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        return found


def duration(seconds: float) -> str:
    """As OpenAI writes them: `120ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:g}s"
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _bucket(per_minute: int | None, at: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, at)
