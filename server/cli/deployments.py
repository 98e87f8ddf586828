"""Deployments, releases and the moves between them, through the API as any client."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from server.cli.app import (
    AsJson,
    api,
    app,
    console,
    fail,
    show_json,
)
from server.cli.rows import Deployment, Expected, Note, ReleaseName, list_rows, show

deployments = typer.Typer(help="Public model names.", invoke_without_command=True)
releases = typer.Typer(help="Versions that can answer.", invoke_without_command=True)

SystemPrompt = Annotated[str | None, typer.Option(help="What the model is told first.")]
Sampling = Annotated[
    str | None, typer.Option(help='Defaults as JSON, such as {"temperature": 0.2}.')
]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="May be given several times.")]
Policies = Annotated[
    str | None, typer.Option(help='Policies as JSON, such as {"curation": {"person_cap": 100}}.')
]


@deployments.callback()
def list_deployments(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["name", "base_model", "production", "previous", "generation", "aliases"]
        list_rows("/admin/deployments", columns, empty="no deployments", as_json=as_json)


@deployments.command("show")
def show_deployment(name: Deployment, as_json: AsJson = False) -> None:
    """One deployment, its roles and engines."""
    with api() as connection:
        show(connection.get(f"/admin/deployments/{name}"), as_json)


def _body(
    system_prompt: str | None, sampling: str | None, alias: list[str] | None, policies: str | None
) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if system_prompt is not None:
        body["system_prompt"] = system_prompt or None
    for key, text in (("sampling", sampling), ("policies", policies)):
        if text is not None:
            try:
                body[key] = json.loads(text)
            except ValueError as error:
                fail(f"--{key} is not JSON: {error}", 2)
    if alias is not None:
        body["aliases"] = alias
    return body


@deployments.command("create")
def create_deployment(
    name: str,
    system_prompt: SystemPrompt = None,
    sampling: Sampling = None,
    alias: Aliases = None,
    policies: Policies = None,
    as_json: AsJson = False,
) -> None:
    """Make a public name, answered by the base until something is promoted."""
    body = {"name": name, **_body(system_prompt, sampling, alias, policies)}
    with api() as connection:
        show(connection.post("/admin/deployments", body), as_json)


@deployments.command("set")
def set_deployment(
    name: Deployment,
    system_prompt: SystemPrompt = None,
    sampling: Sampling = None,
    alias: Aliases = None,
    policies: Policies = None,
    as_json: AsJson = False,
) -> None:
    """Change a deployment. A new system prompt or sampling makes a candidate to promote."""
    body = _body(system_prompt, sampling, alias, policies)
    if not body:
        fail("nothing to set: give --system-prompt, --sampling, --alias or --policies", 2)
    with api() as connection:
        show(connection.patch(f"/admin/deployments/{name}", body), as_json)


@releases.callback()
def list_releases(
    context: typer.Context, deployment: str | None = None, as_json: AsJson = False
) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["name", "suffix", "state", "role", "adapter", "dataset_id", "job_id"]
        list_rows(
            "/admin/releases", columns, empty="no releases", as_json=as_json, deployment=deployment
        )


@releases.command("show")
def show_release(name: ReleaseName, as_json: AsJson = False) -> None:
    """One release, with its newest evaluation."""
    with api() as connection:
        show(connection.get(f"/admin/releases/{name}"), as_json)


@releases.command("discard")
def discard_release(name: ReleaseName, reason: str | None = None, as_json: AsJson = False) -> None:
    """Put a release away for good."""
    with api() as connection:
        show(connection.post(f"/admin/releases/{name}/discard", {"reason": reason}), as_json)


@app.command()
def promote(
    release: ReleaseName,
    note: Note = None,
    force: Annotated[
        bool, typer.Option("--force", help="Without a passed evaluation; takes a note.")
    ] = False,
    expected_generation: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Make a release production, on every engine, without a restart."""
    body = {
        "release": release,
        "note": note,
        "force": force,
        "expected_generation": expected_generation,
    }
    with api() as connection:
        moved = connection.post(f"/admin/deployments/{_deployment_of(release)}/promote", body)
    _tell_move(moved, as_json)


@app.command()
def rollback(
    deployment: Deployment = "assistant",
    note: Note = None,
    expected_generation: Expected = None,
    as_json: AsJson = False,
) -> None:
    """Return to the release before; it has stayed loaded."""
    body = {"note": note, "expected_generation": expected_generation}
    with api() as connection:
        moved = connection.post(f"/admin/deployments/{deployment}/rollback", body)
    _tell_move(moved, as_json)


def _deployment_of(release: str) -> str:
    deployment, at, _ = release.partition("@")
    if not at:
        fail(f"{release!r} is no release; give one like assistant@3 (see `burnish releases`)", 2)
    return deployment


def _tell_move(moved: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(moved)
        return
    console.print(
        f"{moved['name']}: production {moved['production']}, previous {moved['previous'] or '-'}, "
        f"generation {moved['generation']}",
        markup=False,
    )


@app.command()
def explain(
    subject: Annotated[str, typer.Argument(help="A release or a completion id (chatcmpl-…).")],
    as_json: AsJson = False,
) -> None:
    """Where a release comes from, or what became of an answer's judgements."""
    with api() as connection:
        show(connection.get(f"/admin/explain/{subject}"), as_json)
