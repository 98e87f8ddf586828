"""The policy of curation: the settings by which verdicts become training examples.

Owns the choices that a team may want to make otherwise, their defaults and bounds, and the hashes
that name a policy. Does not own what is done with them (`extract.py`, `select.py`) or where a
deployment's policy is kept.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from feedback.curation.examples import ExampleKind
from feedback.db import canonical_json
from feedback.errors import BadRequest
from feedback.numbers import whole


class Policy(BaseModel):
    """How verdicts become examples. Immutable; two equal policies have one hash."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kinds: tuple[Annotated[ExampleKind, Field(strict=False)], ...] = Field(
        default=tuple(ExampleKind), strict=False, description="Kinds of example that are made."
    )
    stars_true: int = Field(
        default=4, ge=1, le=5, description="From so many stars on an answer is labelled true."
    )
    stars_false: int = Field(
        default=2, ge=1, le=5, description="Up to so many stars it is labelled false."
    )
    min_edit_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Smallest edit (see extract.edit_share) from which a correction teaches a "
        "preference too.",
    )
    max_prompt_chars: int = Field(
        default=64_000, ge=1, description="Longest prompt, all messages together."
    )
    max_completion_chars: int = Field(default=32_000, ge=1, description="Longest completion.")
    holdout_share: float = Field(
        default=0.15, ge=0, le=0.9, description="Share of conversations kept for evaluation."
    )
    salt: str = Field(
        default="burnish", max_length=200, description="Another salt draws another split."
    )
    person_cap: int | None = Field(
        default=500, ge=1, description="Most verdicts of one person that teach; null: no cap."
    )
    excluded_people: tuple[str, ...] = Field(
        default=(), strict=False, description="Ids of people whose verdicts teach nothing."
    )

    @model_validator(mode="after")
    def _stars_do_not_overlap(self) -> Policy:
        if self.stars_false >= self.stars_true:
            raise ValueError(
                f"stars_false ({self.stars_false}) must be below stars_true ({self.stars_true})"
            )
        return self

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Policy:
        """The policy that `value` states; what it leaves out is as by default.

        Raises BadRequest with every problem: unknown keys, wrong types, values out of bounds.
        """
        try:
            stated = {key: whole(item) for key, item in value.items()}
            return cls.model_validate_json(canonical_json(stated))
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            problems = []
            for problem in error.errors():
                key = ".".join(map(str, problem["loc"]))
                if problem["type"] == "extra_forbidden":
                    problems.append(f"{key!r} is not known (known: {known})")
                else:
                    problems.append(f"{key!r}: {problem['msg']}" if key else problem["msg"])
            raise BadRequest("curation policy: " + "; ".join(problems), param="policy") from None

    def to_json(self) -> dict[str, Any]:
        """All choices as a JSON object; `from_json` reads it back."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """Names the policy; 32 hex digits."""
        return _hash(self.to_json())

    @property
    def extraction_hash(self) -> str:
        """Names what `extract` reads of it: the key of its cache, which a new cap leaves valid."""
        mine = {
            "kinds",
            "stars_true",
            "stars_false",
            "min_edit_share",
            "max_prompt_chars",
            "max_completion_chars",
        }
        return _hash({"version": EXTRACTION_VERSION, **self.model_dump(mode="json", include=mine)})


EXTRACTION_VERSION = 6
"""Raised when `extract` makes something else of the same answer: nothing old is used then."""


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]
