"""Fixtures that several files share."""

from __future__ import annotations

import functools
import signal

import httpx
import pytest

from tuner import tuning

pytest_plugins = [
    "tests.databases",
    "tests.engine_fixtures",
    "tests.gateway_fixtures",
    "tests.promise_fixtures",
]

# Each of httpx's clients reads the certificates of the world anew, which takes longer than what a
# test asks of a server on loopback.
httpx._transports.default.create_ssl_context = functools.cache(httpx.create_ssl_context)

# Under nohup, or in the background of a shell that isn't interactive, these are ignored, and every
# command that a test starts would ignore them too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def few_judgements_are_enough(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the tests' own process a handful of judgements makes a data set worth tuning on.

    A test marked `real_bound` has the product's own bound.
    """
    if request.node.get_closest_marker("real_bound") is None:
        monkeypatch.setattr(tuning, "FEWEST_JUDGEMENTS", 0)
        monkeypatch.setattr(tuning, "FEW_JUDGEMENTS", 0)
