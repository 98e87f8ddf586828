"""The command line: `burnish …`.

Owns: the commands, what they print, their exit codes. Local commands (`local.py`) work on the data
directory; all others go through the API like any other client. Imports are made inside the
commands, so that `burnish serve` stays a small process without a web framework or a
database.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 no connection, or not ready.
"""

from __future__ import annotations

import os

from server.cli import administration, deployments, local, tuning
from server.cli.app import app
from server.terminal import prepare_output

for name, group in {
    "deployments": deployments.deployments,
    "keys": administration.keys,
    "datasets": tuning.datasets,
    "releases": deployments.releases,
    "jobs": tuning.jobs,
    "audit": administration.audit,
}.items():
    app.add_typer(group, name=name)


def main() -> None:
    """Run the command of the arguments. What it and its children write is for this user alone."""
    os.umask(0o077)
    prepare_output()
    app()


__all__ = ["administration", "app", "deployments", "local", "main", "tuning"]
