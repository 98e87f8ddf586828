"""A deployment's policies: what its row may say, and what it says about curation.

Owns: the shape of `Deployment.policies`. Does not own: the choices of curation
(`feedback/curation/policy.py`) or what routing makes of the others (`chat/directory.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from feedback.curation.policy import Policy
from tuner.tables import Deployment


class Policies(BaseModel):
    """What may be set: a field left out keeps its value, null returns to the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    curation: dict[str, Any] | None = Field(
        default=None, description="Choices between a verdict and a training example."
    )
    system_prompt: Literal["prepend", "replace"] | None = Field(
        default=None,
        description="`prepend`: ours stands before a caller's own; `replace`: a caller's own wins.",
    )
    template_kwargs: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=32)]
        | None
    ) = Field(default=None, description="Keys of `chat_template_kwargs` that callers may set.")


def merge_policies(old: dict[str, Any], new: Policies) -> dict[str, Any]:
    """`old` with what `new` sets. Raises BadRequest for an invalid curation policy."""
    given = {name: getattr(new, name) for name in new.model_fields_set}
    merged = {name: value for name, value in {**old, **given}.items() if value is not None}
    Policy.from_json(merged.get("curation", {}))
    return merged


def curation_policy(
    deployment: Deployment | None, overrides: dict[str, Any] | None = None
) -> Policy:
    """How the deployment's verdicts become examples, `overrides` on top. Raises BadRequest."""
    own = deployment.policies.get("curation", {}) if deployment is not None else {}
    return Policy.from_json({**own, **(overrides or {})})
