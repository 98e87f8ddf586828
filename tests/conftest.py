"""Fixtures that several files share."""

pytest_plugins = [
    "tests.databases",
    "tests.engine_fixtures",
    "tests.gateway_fixtures",
    "tests.promise_fixtures",
]
