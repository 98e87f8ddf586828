"""What commands that go through the API share: how rows are listed and shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli.app import (
    api,
    show_facts,
    show_json,
    show_table,
)

Deployment = Annotated[str, typer.Argument(help="A deployment or one of its aliases.")]


ReleaseName = Annotated[str, typer.Argument(help="A release, such as assistant@3.")]


Note = Annotated[str | None, typer.Option(help="Why; kept in the audit log.")]


Expected = Annotated[
    int | None, typer.Option(help="Refuse unless the deployment is at this generation.")
]


def show(value: dict[str, Any], as_json: bool) -> None:
    show_json(value) if as_json else show_facts(value)


def list_rows(path: str, columns: list[str], *, empty: str, as_json: bool, **query: Any) -> None:
    with api() as connection:
        rows = list(connection.pages(path, limit=100, **query))
    show_json(rows) if as_json else show_table(rows, columns, empty=empty)
