"""Whole numbers as JSON may write them: JavaScript, YAML and spreadsheets write 8 as `8.0`.

Owns: that such a number is taken where a whole one is expected. Texts, and numbers in places that
take any number, stay what they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationInfo, field_validator

_EXACT = 2**53  #: up to here a float says which whole number was meant


def whole(value: Any) -> Any:
    """`value` with `8.0` as 8, in lists too; everything else as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value


@cache
def whole_fields(model: type[BaseModel]) -> frozenset[str]:
    """The fields of a model that take whole numbers and no others."""
    return frozenset(
        name for name, field in model.model_fields.items() if _is_whole(field.annotation)
    )


def _is_whole(annotation: Any) -> bool:
    leaves = _leaves(annotation)
    return any(leaf is int for leaf in leaves) and not any(leaf in (float, Any) for leaf in leaves)


def _leaves(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [annotation]


class WholeNumbers(BaseModel):
    """A model whose strict whole numbers may be written `8.0`."""

    @field_validator("*", mode="before")
    @classmethod
    def _take_whole(cls, value: Any, info: ValidationInfo) -> Any:
        return whole(value) if info.field_name in whole_fields(cls) else value
