"""Keys and the audit log, through the API as any client."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli import local
from server.cli.app import (
    UNREACHABLE,
    AsJson,
    Data,
    api,
    console,
    fail,
    one_sentence,
    show_json,
    show_table,
)
from server.cli.rows import list_rows, show

keys = typer.Typer(help="API keys.", invoke_without_command=True)
audit = typer.Typer(help="Who did what.", invoke_without_command=True)


@keys.callback()
def list_keys(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = [
            "id",
            "user",
            "name",
            "scopes",
            "deployments",
            "end_users",
            "header_only",
            "limits",
            "created_at",
        ]
        list_rows("/admin/keys", columns, empty="no keys", as_json=as_json)


@keys.command("create")
def create_key(
    user: str,
    scope: Annotated[
        list[str] | None, typer.Option(help="chat, feedback, curate, tune, promote, admin, …")
    ] = None,
    deployment: Annotated[list[str] | None, typer.Option(help="Limit to these.")] = None,
    end_users: Annotated[bool, typer.Option(help="The key speaks for many people.")] = False,
    header_only: Annotated[
        bool, typer.Option(help="With --end-users: a header alone says for whom.")
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="requests_per_minute=60, tokens_per_minute=… or concurrent_requests=…; "
            "'none' as the number lifts a default."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="For you to recognise it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key; it is shown this once."""
    body = {"user": user, "scopes": scope or ["chat", "feedback"], "end_users": end_users}
    body |= {"deployments": deployment or None, "name": name, "header_only": header_only}
    body |= {"limits": dict(map(_limit, limit))} if limit else {}
    with api() as connection:
        show(connection.post("/admin/keys", body), as_json)


def _limit(text: str) -> tuple[str, int | None]:
    name, _, number = text.partition("=")
    if number != "none" and not number.isdecimal():
        raise typer.BadParameter(f"{text!r} is no limit; give name=number or name=none")
    return name.replace("-", "_"), None if number == "none" else int(number)


@keys.command("revoke")
def revoke_key(key_id: str) -> None:
    """Put a key out of force."""
    with api() as connection:
        connection.delete(f"/admin/keys/{key_id}")
    console.print(f"{key_id} is revoked", markup=False)


keys.command("recover")(local.recover_key)


@audit.callback()
def list_audit(
    context: typer.Context,
    subject: str | None = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 50,
    as_json: AsJson = False,
) -> None:
    """Without a command: the newest entries."""
    if context.invoked_subcommand is None:
        with api() as connection:
            rows = connection.get("/admin/audit", subject=subject, limit=limit)["data"]
        columns = ["seq", "at", "actor", "action", "subject"]
        show_json(rows) if as_json else show_table(rows, columns, empty="no entries")


@audit.command("verify")
def verify_audit(data: Data = None) -> None:
    """Read the whole log in the database and name the first entry that was altered."""
    from feedback.audit import AuditBroken, verify
    from feedback.db import Database
    from server.access.signing import attach, get_signing
    from server.settings import load_settings

    settings = load_settings(data=data)
    with one_sentence(settings, UNREACHABLE):  # 1 is for a log that was altered
        database = Database(settings.database_url)
        try:
            attach(database, get_signing(settings))
            with database.read() as session:
                found = verify(session)
        except AuditBroken as broken:
            fail(str(broken))
        finally:
            database.dispose()
    signed = f"signed from {found.signed_from} on" if found.signed_from else "none signed"
    console.print(f"{found.entries} entries, none altered, {signed}", markup=False)
