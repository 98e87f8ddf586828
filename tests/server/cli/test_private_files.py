"""What commands write is for the user who runs them alone, however lax their shell is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.promises.processes import build_model, engine_process, gateway_process

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]


def burnish(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "BURNISH_DATA": str(folder / "data"),
        "BURNISH_MODEL__PATH": str(folder / "tiny"),
    }
    return subprocess.run(
        [sys.executable, "-P", "-m", "server.cli", *arguments],
        cwd=ROOT,
        env=environment,
        umask=0,
        capture_output=True,
        text=True,
        check=False,
    )


def open_to_others(folder: Path) -> list[str]:
    found = [folder, *folder.rglob("*")]
    assert any(path.name == "burnish.sqlite3" for path in found)
    return [
        str(path.relative_to(folder)) for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077
    ]


def test_a_database_and_its_keys_are_for_this_user_alone(tmp_path: Path) -> None:
    build_model(tmp_path / "tiny")
    for arguments in (("db", "upgrade"), ("keys", "recover"), ("audit", "verify")):
        done = burnish(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert open_to_others(tmp_path / "data") == [], arguments


def test_what_a_gateway_writes_is_for_this_user_alone(tmp_path: Path) -> None:
    model = build_model(tmp_path / "tiny").path
    assert burnish(tmp_path, "db", "upgrade").returncode == 0
    before = os.umask(0)
    try:
        with (
            engine_process() as engine,
            gateway_process(tmp_path / "data", model, engine, tmp_path / "log") as gateway,
        ):
            assert gateway.terminate() == 0
            assert open_to_others(tmp_path / "data") == []
    finally:
        os.umask(before)


@pytest.mark.parametrize("lax", [0o000, 0o002])
def test_nobody_else_may_write_where_burnish_is_installed(lax: int) -> None:
    code = (
        "import os, bootstrap; bootstrap.check = str; bootstrap.main(['check']); "
        "print(oct(os.umask(0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        umask=lax,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0o22"
