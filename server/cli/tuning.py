"""Data sets, jobs, tuning, evaluations and the whole loop, through the API as any client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.app import (
    REFUSED,
    AsJson,
    api,
    app,
    console,
    fail,
    show_json,
)
from server.cli.rows import Deployment, ReleaseName, list_rows, show
from tuner.methods import HYPERPARAMETERS, Method

datasets = typer.Typer(help="Frozen training examples.", invoke_without_command=True)
jobs = typer.Typer(help="Work in the background.", invoke_without_command=True)


@datasets.callback()
def list_datasets(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the list."""
    if context.invoked_subcommand is None:
        columns = ["id", "deployment", "status", "counts", "dropped"]
        list_rows("/admin/datasets", columns, empty="no data sets", as_json=as_json)


@datasets.command("create")
def create_dataset(deployment: Deployment = "assistant", as_json: AsJson = False) -> None:
    """Freeze what people have said so far into training examples."""
    from server.cli.watch import freeze

    with api() as connection:
        dataset = freeze(connection, deployment)
    show(dataset, as_json)
    if dataset["status"] == "failed":
        raise typer.Exit(REFUSED)


@datasets.command("show")
def show_dataset(dataset_id: str, as_json: AsJson = False) -> None:
    """One data set."""
    with api() as connection:
        show(connection.get(f"/admin/datasets/{dataset_id}"), as_json)


def _meaning(name: str) -> str:
    """What a hyperparameter means, as a sentence of help."""
    return f"{HYPERPARAMETERS[name].meaning.capitalize()}."


@app.command()
def tune(
    deployment: Deployment = "assistant",
    method: Annotated[
        Method, typer.Option(help="What it learns by; combined takes all kinds of example.")
    ] = Method.COMBINED,
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
                "method": {"type": method, str(method): {"hyperparameters": hyperparameters}},
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
        list_rows("/admin/jobs", columns, empty="no jobs", as_json=as_json)


@jobs.command("show")
def show_job(job_id: str, as_json: AsJson = False) -> None:
    """One job, with its result or the reason of its failure."""
    with api() as connection:
        show(connection.get(f"/admin/jobs/{job_id}"), as_json)


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
