"""Commands that go through the API, as any client could: keys, data sets, tuning, moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli import local
from server.cli.app import (
    REFUSED,
    UNREACHABLE,
    AsJson,
    Data,
    api,
    app,
    console,
    fail,
    one_sentence,
    show_facts,
    show_json,
    show_table,
)
from tuner.methods import HYPERPARAMETERS, IMPLEMENTED

deployments = typer.Typer(help="Public model names.", invoke_without_command=True)
keys = typer.Typer(help="API keys.", invoke_without_command=True)
datasets = typer.Typer(help="Frozen training examples.", invoke_without_command=True)
releases = typer.Typer(help="Versions that can answer.", invoke_without_command=True)
jobs = typer.Typer(help="Work in the background.", invoke_without_command=True)
audit = typer.Typer(help="Who did what.", invoke_without_command=True)
for name, group in {
    "deployments": deployments,
    "keys": keys,
    "datasets": datasets,
    "releases": releases,
    "jobs": jobs,
    "audit": audit,
}.items():
    app.add_typer(group, name=name)

Deployment = Annotated[str, typer.Argument(help="A deployment or one of its aliases.")]
ReleaseName = Annotated[str, typer.Argument(help="A release, such as assistant@3.")]
Note = Annotated[str | None, typer.Option(help="Why; kept in the audit log.")]
Expected = Annotated[
    int | None, typer.Option(help="Refuse unless the deployment is at this generation.")
]


def _show(value: dict[str, Any], as_json: bool) -> None:
    show_json(value) if as_json else show_facts(value)


def _list(path: str, columns: list[str], *, empty: str, as_json: bool, **query: Any) -> None:
    with api() as connection:
        rows = list(connection.pages(path, limit=100, **query))
    show_json(rows) if as_json else show_table(rows, columns, empty=empty)


# Deployments


@deployments.callback()
def list_deployments(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["name", "base_model", "production", "previous", "generation", "aliases"]
        _list("/admin/deployments", columns, empty="no deployments", as_json=as_json)


@deployments.command("show")
def show_deployment(name: Deployment, as_json: AsJson = False) -> None:
    """One deployment, its roles and engines."""
    with api() as connection:
        _show(connection.get(f"/admin/deployments/{name}"), as_json)


SystemPrompt = Annotated[str | None, typer.Option(help="What the model is told first.")]
Sampling = Annotated[
    str | None, typer.Option(help='Defaults as JSON, such as {"temperature": 0.2}.')
]
Aliases = Annotated[list[str] | None, typer.Option("--alias", help="May be given several times.")]
Policies = Annotated[
    str | None, typer.Option(help='Policies as JSON, such as {"curation": {"person_cap": 100}}.')
]


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
        _show(connection.post("/admin/deployments", body), as_json)


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
        _show(connection.patch(f"/admin/deployments/{name}", body), as_json)


# Keys


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
        _list("/admin/keys", columns, empty="no keys", as_json=as_json)


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
        _show(connection.post("/admin/keys", body), as_json)


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


# Data sets and tuning


@datasets.callback()
def list_datasets(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["id", "deployment", "status", "counts", "dropped"]
        _list("/admin/datasets", columns, empty="no data sets", as_json=as_json)


@datasets.command("create")
def create_dataset(deployment: Deployment = "assistant", as_json: AsJson = False) -> None:
    """Freeze what people have said so far into training examples."""
    from server.cli.watch import freeze

    with api() as connection:
        dataset = freeze(connection, deployment)
    _show(dataset, as_json)
    if dataset["status"] == "failed":
        raise typer.Exit(REFUSED)


@datasets.command("show")
def show_dataset(dataset_id: str, as_json: AsJson = False) -> None:
    """One data set."""
    with api() as connection:
        _show(connection.get(f"/admin/datasets/{dataset_id}"), as_json)


def _meaning(name: str) -> str:
    """What a hyperparameter means, as a sentence of help."""
    return f"{HYPERPARAMETERS[name].meaning.capitalize()}."


@app.command()
def tune(
    deployment: Deployment = "assistant",
    method: Annotated[str, typer.Option(help=f"{' or '.join(IMPLEMENTED)}.")] = "supervised",
    dataset: Annotated[
        str | None, typer.Option(help="ds_… or file-…; by default a new data set is made.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="file-… whose rows end the run early and never train.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="What you call the release.")] = None,
    epochs: Annotated[int | None, typer.Option(help=_meaning("n_epochs"))] = None,
    learning_rate: Annotated[float | None, typer.Option(help=_meaning("learning_rate"))] = None,
    rank: Annotated[int | None, typer.Option(help=_meaning("r"))] = None,
    seed: Annotated[int, typer.Option(help="Same data, settings and seed: same adapter.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its evaluation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tune on what people have said: a data set, a job, a candidate, its evaluation."""
    from server.cli.watch import follow_evaluation, follow_tuning, freeze

    with api() as connection:
        if dataset is None:
            frozen = freeze(connection, deployment)
            if frozen["status"] == "failed":
                fail(f"no data set could be made: {frozen['error']}")
            dataset = str(frozen["id"])
            if not as_json:
                console.print(f"data set {dataset}: {_counts(frozen)}", markup=False)
        given = {"n_epochs": epochs, "learning_rate": learning_rate, "r": rank}
        hyperparameters = {key: value for key, value in given.items() if value is not None}
        job = connection.post(
            "/v1/fine_tuning/jobs",
            {
                "model": deployment,
                "training_file": dataset,
                "validation_file": validation,
                "suffix": suffix,
                "seed": seed,
                "method": {"type": method, method: {"hyperparameters": hyperparameters}},
            },
        )
        if not watch:
            if as_json:
                show_json(job)
            else:
                console.print(f"job {job['id']} is {job['status']}", markup=False)
                console.print(f"to follow it: burnish jobs watch {job['id']}", markup=False)
            return
        job = follow_tuning(connection, job["id"])
        _end_of_tuning(job)
        evaluation_id = connection.get(f"/admin/jobs/{job['id']}")["result"].get("evaluation_id")
        evaluation = follow_evaluation(connection, evaluation_id) if evaluation_id else None
    if as_json:
        show_json({"job": job, "evaluation": evaluation})
        return
    console.print(f"candidate {job['fine_tuned_model']}", markup=False)
    if evaluation is not None:
        _tell_evaluation(evaluation)


def _counts(dataset: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {kind}" for kind, number in dataset["counts"].items())
    dropped = sum(dataset["dropped"].values())
    return f"{counts}; {dropped} left out, by reason: {dataset['dropped'] or 'none'}"


def _end_of_tuning(job: dict[str, Any]) -> None:
    if job["status"] != "succeeded":
        reason = (job.get("error") or {}).get("message") or "see its events"
        fail(f"job {job['id']} is {job['status']}: {reason}")


def _tell_evaluation(evaluation: dict[str, Any]) -> None:
    if evaluation["decision"] is None:
        fail(f"evaluation {evaluation['id']} failed: {evaluation['error']}")
    console.print(f"evaluation {evaluation['id']}: {evaluation['decision']}", markup=False)
    for reason in evaluation["reasons"]:
        console.print(f"  {reason}", markup=False)
    if evaluation["decision"] == "pass":
        console.print(f"to promote it: burnish promote {evaluation['release']}", markup=False)


@jobs.callback()
def list_jobs(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["id", "kind", "deployment", "status", "error"]
        _list("/admin/jobs", columns, empty="no jobs", as_json=as_json)


@jobs.command("show")
def show_job(job_id: str, as_json: AsJson = False) -> None:
    """One job, with its result or the reason of its failure."""
    with api() as connection:
        _show(connection.get(f"/admin/jobs/{job_id}"), as_json)


@jobs.command("watch")
def watch_job(job_id: str) -> None:
    """Follow a tuning job to its end."""
    from server.cli.watch import follow_tuning

    with api() as connection:
        job = follow_tuning(connection, job_id)
    _end_of_tuning(job)
    console.print(f"candidate {job['fine_tuned_model']}", markup=False)


@jobs.command("cancel")
def cancel_job(job_id: str) -> None:
    """Ask a tuning job to end."""
    with api() as connection:
        job = connection.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    console.print(f"{job_id} is {job['status']}", markup=False)


@jobs.command("pause")
def pause_job(job_id: str) -> None:
    """Stop a tuning job for now; it keeps its checkpoints."""
    with api() as connection:
        job = connection.post(f"/v1/fine_tuning/jobs/{job_id}/pause")
    console.print(f"{job_id} is {job['status']}", markup=False)


@jobs.command("resume")
def resume_job(job_id: str) -> None:
    """Let a paused tuning job go on from its newest checkpoint."""
    with api() as connection:
        job = connection.post(f"/v1/fine_tuning/jobs/{job_id}/resume")
    console.print(f"{job_id} is {job['status']}", markup=False)


# Releases and their moves


@releases.callback()
def list_releases(
    context: typer.Context, deployment: str | None = None, as_json: AsJson = False
) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["name", "suffix", "state", "role", "adapter", "dataset_id", "job_id"]
        _list(
            "/admin/releases", columns, empty="no releases", as_json=as_json, deployment=deployment
        )


@releases.command("show")
def show_release(name: ReleaseName, as_json: AsJson = False) -> None:
    """One release, with its newest evaluation."""
    with api() as connection:
        _show(connection.get(f"/admin/releases/{name}"), as_json)


@releases.command("discard")
def discard_release(name: ReleaseName, reason: str | None = None, as_json: AsJson = False) -> None:
    """Put a release away for good."""
    with api() as connection:
        _show(connection.post(f"/admin/releases/{name}/discard", {"reason": reason}), as_json)


@app.command()
def evaluate(
    release: ReleaseName,
    baseline: Annotated[str | None, typer.Option(help="By default production.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a release with production on the holdout, and wait for the decision."""
    from server.cli.watch import follow_evaluation

    with api() as connection:
        asked = connection.post("/admin/evaluations", {"release": release, "baseline": baseline})
        evaluation = follow_evaluation(connection, asked["id"])
    show_json(evaluation) if as_json else _tell_evaluation(evaluation)
    if evaluation["decision"] == "fail":
        raise typer.Exit(REFUSED)


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
        _show(connection.get(f"/admin/explain/{subject}"), as_json)


# The audit log


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


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep/--roll-back", help="What is in production afterwards.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(help="Write all answers to this JSON file.")
    ] = None,
) -> None:
    """The whole loop: chat, judge, freeze, tune, evaluate, promote, and what has changed."""
    from server.cli.demo import run_demo, service

    with service(), api() as connection:
        code = run_demo(connection, keep=keep, report=report)
    raise typer.Exit(code)
