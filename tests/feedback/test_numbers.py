"""Whole numbers as JSON may write them."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import ConfigDict, Field, ValidationError

from feedback.curation.policy import Policy
from feedback.errors import BadRequest
from feedback.numbers import WholeNumbers, whole, whole_fields


class Counts(WholeNumbers):
    model_config = ConfigDict(strict=True)

    most: Annotated[int, Field(ge=1)] | None = None
    each: list[int] = []
    share: float = 0.5
    either: int | float = 1
    anything: Any = None
    name: str = ""


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (8.0, 8),
        (-1.0, -1),
        ([1.0, 2, [3.0]], [1, 2, [3]]),
        (8.5, 8.5),
        (1e300, 1e300),  # a float of that size says no whole number exactly
        ("8.0", "8.0"),
        (True, True),
        (None, None),
        ({"a": 8.0}, {"a": 8.0}),
    ],
)
def test_only_whole_numbers_change_their_type(value: Any, taken: Any) -> None:
    found = whole(value)
    assert (found, type(found)) == (taken, type(taken))


def test_only_fields_of_whole_numbers_take_them() -> None:
    assert whole_fields(Counts) == {"most", "each"}
    found = Counts(most=8.0, each=[1.0], share=1.0, either=2.0, anything=3.0)
    assert [type(v) for v in (found.most, found.each[0])] == [int, int]
    assert [type(v) for v in (found.share, found.either, found.anything)] == [float] * 3


@pytest.mark.parametrize("broken", [{"most": 8.5}, {"most": 0.0}, {"each": [1.5]}, {"name": 8.0}])
def test_what_is_no_whole_number_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Counts(**broken)


def test_a_policy_takes_whole_numbers_with_a_point() -> None:
    given = Policy.from_json({"stars_true": 5.0, "person_cap": 20.0, "holdout_share": 0.0})
    assert given == Policy.from_json({"stars_true": 5, "person_cap": 20, "holdout_share": 0.0})
    lists = {"kinds": ["preference"], "excluded_people": ["person_1"], "stars_true": 5.0}
    assert Policy.from_json(lists).excluded_people == ("person_1",)
    with pytest.raises(BadRequest, match="stars_true"):
        Policy.from_json({"stars_true": 4.5})
