"""Commands that work on this machine: serve, gateway, worker, db, doctor, keys recover."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.app import REFUSED, AsJson, Data, app, console, fail, one_sentence, show_json
from server.data_folder import prepare_data
from server.settings import Settings, load_settings
from server.terminal import write_line

if TYPE_CHECKING:
    from server.setup.upgrade import Upgraded

db = typer.Typer(help="The database.", no_args_is_help=True)
app.add_typer(db, name="db")


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Directory of a chat model, or a hub's ORG/NAME.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data: Data = None,
) -> None:
    """Serve: engine, gateway and worker, each kept alive, until Ctrl-C."""
    from server.processes import supervisor

    settings = load_settings(
        host=host, port=port, data=data, model=None if model is None else {"path": model}
    )
    first = not (settings.data / "credentials").exists()
    supervisor.say("preparing; the first answer takes one to two minutes")

    def on_ready() -> None:
        write_line(_welcome(settings, supervisor.local_url(settings), first))

    raise typer.Exit(supervisor.run(settings, on_ready))


def _welcome(settings: Settings, url: str, first: bool) -> str:
    """Where to chat, with which key, and three lines to try."""
    from server.cli.api import read_credentials

    credentials = settings.data / "credentials"
    key = read_credentials(settings.data).get("api_key", "sk-…")
    question = '{"messages": [{"role": "user", "content": "Hello!"}], "model": "%s"}'
    elsewhere = "" if settings.data == Path("data") else f"BURNISH_DATA={settings.data} "
    return f"""
Burnish is ready.

  chat in the browser   {url}/
  OpenAI API            {url}/v1   (model {settings.deployment!r})
  admin key             {key if first else f"in {credentials}, as before"}

Three lines to try:

  export KEY={key if first else "sk-…"}
  curl {url}/v1/chat/completions -H "Authorization: Bearer $KEY" \\
       -H "Content-Type: application/json" -d '{question % settings.deployment}'
  {elsewhere}.venv/bin/burnish demo

Ctrl-C ends everything."""


@app.command()
def gateway(host: str | None = None, port: int | None = None, data: Data = None) -> None:
    """Run a gateway alone; its engine is found in DATA/run, or named by engine.urls."""
    from server.app import serve as serve_gateway
    from server.logs import configure_logging

    settings = load_settings(host=host, port=port, data=data)
    prepare_data(settings)
    configure_logging(settings.log_level)
    end_on_hangup()
    with one_sentence(settings):
        raise typer.Exit(serve_gateway(settings))


def end_on_hangup() -> None:
    """Take the end of the terminal for SIGTERM; `nohup` has it ignored, and means it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


@app.command()
def worker(data: Data = None) -> None:
    """Run a worker alone: data sets, tuning, evaluations."""
    from server.access.signing import get_signing
    from server.logs import configure_logging
    from server.processes.supervisor import local_url
    from server.setup.upgrade import read_internal_key
    from tuner.work.workbench import WorkerOptions
    from tuner.work.worker import run_worker

    settings = load_settings(data=data)
    prepare_data(settings)
    configure_logging(settings.log_level)
    end_on_hangup()
    given = settings.worker.api_key
    key = given.get_secret_value() if given is not None else read_internal_key(settings)
    if key is None:
        fail(
            "no internal key: run `burnish db upgrade`, which writes "
            f"{settings.run_dir / 'internal.key'}, or set worker.api_key"
        )
    with one_sentence(settings):
        signing = get_signing(settings)
    cpus = len(os.sched_getaffinity(0))
    options = WorkerOptions(
        database_url=settings.database_url,
        data=settings.data,
        model_dir=settings.model_dir,
        base_name=settings.base_name,
        gateway_url=settings.worker.gateway_url or local_url(settings),
        api_key=key,
        model_revision=settings.model.revision,
        max_lora_rank=settings.engine.max_lora_rank,
        max_model_len=settings.engine.max_model_len,
        training_threads=settings.worker.training_threads or cpus,
        lease_seconds=settings.worker.lease_seconds,
        poll_seconds=settings.worker.poll_seconds,
        max_attempts=settings.worker.max_attempts,
        seal=signing.seal,
    )
    with one_sentence(settings):
        run_worker(options)


@db.command()
def upgrade(
    data: Data = None,
    print_key: Annotated[bool, typer.Option(help="Print the first admin key.")] = True,
    new_secret: Annotated[
        bool, typer.Option("--new-secret", help="Sign with a new secret from now on.")
    ] = False,
) -> None:
    """Bring the schema up to date; make keys and the first deployment where they are missing."""
    from feedback.db import Database
    from server.app import read_base
    from server.processes.supervisor import local_url
    from server.setup.upgrade import upgrade as run_upgrade

    settings = load_settings(data=data)
    prepare_data(settings)
    with one_sentence(settings):
        database = Database(settings.database_url)
        done = run_upgrade(
            settings,
            database,
            read_base(settings),
            url=local_url(settings),
            new_secret=new_secret,
        )
        database.dispose()
    _tell(done, settings, print_key)


def _tell(done: Upgraded, settings: Settings, print_key: bool) -> None:
    if done.deployment is not None:
        console.print(f"made the deployment {done.deployment!r}", markup=False)
    if done.admin_key is not None:
        where = f"also in {settings.data / 'credentials'}"
        shown = f": {done.admin_key} ({where})" if print_key else f" ({where})"
        console.print(f"made the first admin key{shown}", markup=False, soft_wrap=True)


@app.command()
def doctor(data: Data = None, as_json: AsJson = False) -> None:
    """Look at everything that Burnish needs, and say what is wrong and what to do."""
    from dataclasses import asdict

    from server.setup.doctor import Level, diagnose

    findings = diagnose(load_settings(data=data))
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        marks = {Level.OK: "ok     ", Level.WARNING: "warning", Level.PROBLEM: "PROBLEM"}
        for finding in findings:
            line = f"{marks[finding.level]}  {finding.topic}: {finding.found}"
            console.print(line, markup=False, soft_wrap=True)
            if finding.advice:
                console.print(f"         → {finding.advice}", markup=False, soft_wrap=True)
    if any(finding.level is Level.PROBLEM for finding in findings):
        raise typer.Exit(REFUSED)


def recover_key(data: Data = None) -> None:
    """Make a new admin key, for whoever lost theirs and may write the data directory."""
    from feedback.db import Database
    from server.processes.supervisor import local_url
    from server.setup.upgrade import recover_admin_key

    settings = load_settings(data=data)
    prepare_data(settings)
    with one_sentence(settings):
        database = Database(settings.database_url)
        token = recover_admin_key(settings, database, url=local_url(settings))
        database.dispose()
    console.print(
        f"{token} (also in {settings.data / 'credentials'})", markup=False, soft_wrap=True
    )
