"""Models: the names that a caller may give as `model`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NotRequired

from typing_extensions import TypedDict


class ModelObject(TypedDict):
    """What a caller may name as `model`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: NotRequired[str]  # of a release: its deployment


class ModelList(TypedDict):
    """OpenAI's list of models, which has no pages."""

    object: Literal["list"]
    data: list[ModelObject]


def view_model(name: str, *, parent: str | None = None) -> ModelObject:
    """A name; `parent` is the deployment of a release."""
    shown: ModelObject = {"id": name, "object": "model", "created": 0, "owned_by": "burnish"}
    if parent is not None:
        shown["parent"] = parent
    return shown


def view_models(names: Iterable[str]) -> ModelList:
    """A list of names."""
    return {"object": "list", "data": [view_model(name) for name in names]}
