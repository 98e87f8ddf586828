"""A deployment's policies: what is set stands in its row, and what it says about curation.

Owns: how `Deployment.policies` is changed and read for curation. Does not own: the choices of
curation (`feedback/curation/policy.py`), or what routing makes of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from feedback.curation.policy import Policy
from tuner.tables import Deployment


def merge_policies(old: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with what is `given`; null returns to the default.

    Raises BadRequest for an invalid curation policy.
    """
    merged = {name: value for name, value in {**old, **given}.items() if value is not None}
    Policy.from_json(merged.get("curation", {}))
    return merged


def curation_policy(
    deployment: Deployment | None, overrides: Mapping[str, Any] | None = None
) -> Policy:
    """How the deployment's verdicts become examples, `overrides` on top. Raises BadRequest."""
    own = deployment.policies.get("curation", {}) if deployment is not None else {}
    return Policy.from_json({**own, **(overrides or {})})
