"""The routes of the API, one module per noun.

A route reads like a table of contents; the rules are elsewhere.
"""

from typing import Any

from server.endpoints import (
    adapters,
    audit,
    chat,
    comparisons,
    datasets,
    deployments,
    evaluations,
    explain,
    feedback,
    files,
    fine_tuning,
    health,
    internal,
    jobs,
    keys,
    metrics,
    models,
    pages,
    releases,
    stored,
    whoami,
)

ROUTERS = (
    health.router,
    chat.router,
    stored.router,
    models.router,
    feedback.router,
    comparisons.router,
    files.router,
    fine_tuning.router,
    whoami.router,
    deployments.router,
    releases.router,
    adapters.router,
    datasets.router,
    evaluations.router,
    explain.router,
    jobs.router,
    keys.router,
    audit.router,
    metrics.router,
    internal.router,
    pages.router,
)

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": _TEXT,
        "type": _TEXT,
        "param": _TEXT_OR_NULL,
        "code": _TEXT_OR_NULL,
    },
}
_ENVELOPE = {"type": "object", "required": ["error"], "properties": {"error": _ERROR}}
_CONTENT = {"application/json": {"schema": _ENVELOPE}}

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be served as it is.", "content": _CONTENT},
    "5XX": {"description": "It could not be served now.", "content": _CONTENT},
}
"""What every failed request is answered with, for the API's description."""
