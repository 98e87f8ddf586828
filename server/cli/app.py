"""The Typer application and what every command shares: settings, output, failure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.api import Api, ApiError, NoConnection, connect
from server.settings import Settings
from server.terminal import as_json_escapes, printable

REFUSED = 1
UNREACHABLE = 3

app = typer.Typer(
    name="burnish",
    help="Serve a chat model, record what people think of its answers, retune, promote.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class PlainConsole(Console):
    """A console on which texts of others move no cursor."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


console = PlainConsole(highlight=False)

Data = Annotated[
    Path | None, typer.Option("--data", help="Directory of everything that Burnish writes.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def fail(message: str, code: int = REFUSED) -> NoReturn:
    """Say why on standard error, and end."""
    sys.stderr.write(f"burnish: {printable(message)}\n")
    raise typer.Exit(code)


@contextmanager
def one_sentence(settings: Settings, code: int = REFUSED) -> Iterator[None]:
    """End a local command with one sentence where the model, the database or a file is amiss."""
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.db import DatabaseUnfit, show_url
    from server.schema import UpgradeError
    from tuner.base_models import BaseModelError

    try:
        yield
    except (DatabaseUnfit, BaseModelError, UpgradeError) as error:
        fail(str(error), code)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("psycopg"):
            raise
        fail("PostgreSQL needs the package psycopg: `pip install -e .[postgres]`", code)
    except SQLAlchemyError as error:
        shown = show_url(settings.database_url)
        said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        fail(f"the database {shown} can't be used: {said}; see the setting database.url", code)
    except OSError as error:
        where = "" if error.filename is None else f" {str(error.filename)!r}"
        fail(f"{error.strerror or error}{where}", code)


@contextmanager
def api() -> Iterator[Api]:
    """A connection to the gateway; errors end the command with one line."""
    try:
        with connect() as connection:
            yield connection
    except ApiError as error:
        fail(error.message, UNREACHABLE if error.status == 503 else REFUSED)
    except NoConnection as error:
        fail(str(error), UNREACHABLE)


def show_json(value: Any) -> None:
    """JSON on standard output."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    sys.stdout.write(as_json_escapes(text) + "\n")


def show_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
    """Some columns of some rows; `empty` where there are none."""
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        # As text: a pair of brackets in what people wrote is no markup.
        table.add_row(*(Text(_text(row.get(column))) for column in columns))
    console.print(table)


def show_facts(value: Any, indent: int = 0) -> None:
    """A nested object as indented lines."""
    space = "  " * indent
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping | list) and inner:
                console.print(f"{space}{key.replace('_', ' ')}:", markup=False, soft_wrap=True)
                show_facts(inner, indent + 1)
            else:
                console.print(
                    f"{space}{key.replace('_', ' ')}: {_text(inner)}",
                    markup=False,
                    soft_wrap=True,
                )
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, Mapping):
                console.print(f"{space}-", markup=False, soft_wrap=True)
                show_facts(inner, indent + 1)
            else:
                console.print(f"{space}- {_text(inner)}", markup=False, soft_wrap=True)


def _text(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{printable(str(key))} {_text(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))
