"""Fixtures that several files share."""

from __future__ import annotations

import functools

import httpx

pytest_plugins = [
    "tests.databases",
    "tests.engine_fixtures",
    "tests.gateway_fixtures",
    "tests.promise_fixtures",
]

# Each of httpx's clients reads the certificates of the world anew, which takes longer than what a
# test asks of a server on loopback.
httpx._transports.default.create_ssl_context = functools.cache(httpx.create_ssl_context)
