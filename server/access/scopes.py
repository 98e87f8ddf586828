"""Scopes, and the table that says which route needs which.

Does not own: who holds a scope (`keyring.py`), what a scope's routes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any


class Scope(StrEnum):
    CHAT = "chat"  #: chat, text completions, models, one's own stored completions
    FEEDBACK = "feedback"  #: judge one's own answers
    RATE = "rate"  #: judge what a batch or the queue hands out
    CURATE = "curate"  #: read everybody's answers and judgements, make data sets
    TUNE = "tune"  #: jobs, files, evaluations
    PROMOTE = "promote"  #: move releases
    ADMIN = "admin"  #: all of the above, keys, deployments, audit
    INTERNAL = "internal"  #: the worker's way to the gateway; no key made through the API has it


PUBLIC: frozenset[tuple[str, str]] = frozenset(
    {
        ("GET", "/"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/openapi.json"),
        ("GET", "/static/{path:path}"),
    }
)


ROUTES: Mapping[tuple[str, str], Scope] = {
    ("POST", "/v1/chat/completions"): Scope.CHAT,
    ("GET", "/v1/chat/completions"): Scope.CHAT,
    ("GET", "/v1/chat/completions/{completion_id}"): Scope.CHAT,
    ("POST", "/v1/chat/completions/{completion_id}"): Scope.CHAT,
    ("DELETE", "/v1/chat/completions/{completion_id}"): Scope.CHAT,
    ("GET", "/v1/chat/completions/{completion_id}/messages"): Scope.CHAT,
    ("POST", "/v1/completions"): Scope.CHAT,
    ("GET", "/v1/models"): Scope.CHAT,
    ("GET", "/v1/models/{model:path}"): Scope.CHAT,
    ("POST", "/v1/feedback"): Scope.FEEDBACK,
    ("POST", "/v1/feedback/tokens"): Scope.FEEDBACK,
    ("GET", "/v1/feedback"): Scope.FEEDBACK,
    ("GET", "/v1/feedback/{judgement_id}"): Scope.FEEDBACK,
    ("DELETE", "/v1/feedback/{judgement_id}"): Scope.FEEDBACK,
    ("POST", "/v1/comparisons"): Scope.FEEDBACK,
    ("GET", "/v1/files"): Scope.TUNE,
    ("POST", "/v1/files"): Scope.TUNE,
    ("GET", "/v1/files/{file_id}"): Scope.TUNE,
    ("DELETE", "/v1/files/{file_id}"): Scope.TUNE,
    ("GET", "/v1/files/{file_id}/content"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): Scope.TUNE,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Scope.TUNE,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Scope.TUNE,
    ("GET", "/admin/whoami"): Scope.CHAT,
    ("GET", "/admin/deployments"): Scope.CURATE,
    ("POST", "/admin/deployments"): Scope.ADMIN,
    ("GET", "/admin/deployments/{name}"): Scope.CURATE,
    ("PATCH", "/admin/deployments/{name}"): Scope.ADMIN,
    ("POST", "/admin/deployments/{name}/promote"): Scope.PROMOTE,
    ("POST", "/admin/deployments/{name}/rollback"): Scope.PROMOTE,
    ("GET", "/admin/releases"): Scope.CURATE,
    ("GET", "/admin/releases/{name}"): Scope.CURATE,
    ("POST", "/admin/releases/{name}/discard"): Scope.PROMOTE,
    ("GET", "/admin/adapters/{adapter_id}"): Scope.CURATE,
    ("POST", "/admin/datasets"): Scope.CURATE,
    ("GET", "/admin/datasets"): Scope.CURATE,
    ("GET", "/admin/datasets/{dataset_id}"): Scope.CURATE,
    ("POST", "/admin/evaluations"): Scope.TUNE,
    ("GET", "/admin/evaluations"): Scope.CURATE,
    ("GET", "/admin/evaluations/{evaluation_id}"): Scope.CURATE,
    ("GET", "/admin/jobs"): Scope.TUNE,
    ("GET", "/admin/jobs/{job_id}"): Scope.TUNE,
    ("GET", "/admin/explain/{subject}"): Scope.CURATE,
    ("POST", "/admin/keys"): Scope.ADMIN,
    ("GET", "/admin/keys"): Scope.ADMIN,
    ("DELETE", "/admin/keys/{key_id}"): Scope.ADMIN,
    ("GET", "/admin/audit"): Scope.ADMIN,
    ("GET", "/admin/audit/verify"): Scope.ADMIN,
    ("GET", "/metrics"): Scope.ADMIN,
    ("POST", "/internal/evaluation-slot"): Scope.INTERNAL,
    ("POST", "/internal/evaluation-slot/{token}/beat"): Scope.INTERNAL,
    ("DELETE", "/internal/evaluation-slot/{token}"): Scope.INTERNAL,
    ("POST", "/internal/score"): Scope.INTERNAL,
}
"""Which route needs which scope.

A route that stands neither here nor in `PUBLIC` stops the gateway's start.
"""


TOKEN_ROUTES = frozenset({("POST", "/v1/feedback"), ("GET", "/v1/feedback/{judgement_id}")})
"""What a feedback token opens, for its one answer."""


def check_routes(routes: Iterable[Any]) -> None:
    """Check that every route is public or in the table, and every row of the table a route.

    Raises RuntimeError otherwise.
    """
    seen = {
        (method, route.path)
        for route in routes
        for method in (getattr(route, "methods", None) or set()) - {"HEAD"}
    }
    listed = ROUTES.keys() | PUBLIC
    if seen - listed or ROUTES.keys() - seen:
        raise RuntimeError(
            f"routes without a scope: {sorted(seen - listed)}; "
            f"scopes without a route: {sorted(ROUTES.keys() - seen)}"
        )
