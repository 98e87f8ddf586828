"""Following work that takes long: data sets, tuning jobs, evaluations, with live progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from server.cli.api import Api, ApiError, NoConnection
from server.cli.app import console

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0  #: how long a gateway may be away while something is followed
ENDED = ("succeeded", "failed", "cancelled", "paused")  #: nothing more happens by itself


def progress_bar() -> Progress:
    """The bar of every command that takes long."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def patiently(ask: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`ask`, again while the gateway is away for a moment (a restart must not end a watch)."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask(*arguments, **options)
        except (NoConnection, ApiError) as error:
            away = isinstance(error, NoConnection) or error.status == 503
            if not away or time.monotonic() > until:
                raise
            time.sleep(POLL_SECONDS)


def freeze(api: Api, deployment: str) -> dict[str, Any]:
    """Make a data set and wait until it is ready, or has failed."""
    dataset: dict[str, Any] = api.post(
        "/admin/datasets", {"deployment": deployment, "wait_seconds": 30}
    )
    while dataset["status"] not in ("ready", "failed"):
        time.sleep(POLL_SECONDS)
        dataset = patiently(api.get, f"/admin/datasets/{dataset['id']}")
    return dataset


def follow_tuning(api: Api, job_id: str) -> dict[str, Any]:
    """Show a tuning job's progress until it has ended; the job."""
    seen: set[str] = set()
    with progress_bar() as progress:
        bar = progress.add_task("waiting for a worker", total=1, note="")
        while True:
            job: dict[str, Any] = patiently(api.get, f"/v1/fine_tuning/jobs/{job_id}")
            path = f"/v1/fine_tuning/jobs/{job_id}/events"
            events = patiently(api.get, path, limit=100)["data"]
            for event in reversed(events):
                if event["id"] in seen:
                    continue
                seen.add(event["id"])
                figures = event.get("data") or {}
                if "steps" in figures and event["type"] == "metrics":
                    progress.update(
                        bar,
                        description="training",
                        completed=figures["step"],
                        total=figures.get("steps") or 1,
                        note=_note(figures),
                    )
                elif event["type"] != "metrics" or "full_valid_loss" in figures:
                    progress.console.print(f"  {event['message']}", markup=False)
            if job["status"] in ENDED:
                progress.update(bar, note=str(job["status"]))
                return job
            time.sleep(POLL_SECONDS)


def _note(figures: dict[str, Any]) -> str:
    loss, speed = figures.get("loss"), figures.get("tokens_per_second")
    parts = [] if loss is None else [f"loss {loss:.3f}"]
    return ", ".join(parts + ([] if speed is None else [f"{speed:.0f} tokens/s"]))


def follow_evaluation(api: Api, evaluation_id: str) -> dict[str, Any]:
    """Wait for an evaluation's decision; the evaluation."""
    with console.status("comparing with production (one to three minutes without a GPU)"):
        while True:
            evaluation: dict[str, Any] = patiently(api.get, f"/admin/evaluations/{evaluation_id}")
            if evaluation["decision"] is not None or evaluation["error"]:
                return evaluation
            time.sleep(POLL_SECONDS)
