"""What a machine must have, and when the environment is made anew."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def load_bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load_bootstrap()


@pytest.mark.parametrize(
    ("platform", "said"),
    [
        (("Darwin", "arm64", ("", ""), set()), r"Linux and found Darwin: use `docker compose up`"),
        (("Windows", "AMD64", ("", ""), set()), r"found Windows: .* WSL2"),
        (("Linux", "riscv64", ("glibc", "2.39"), set()), r"x86-64 or arm64 .* found riscv64"),
        (
            ("Linux", "x86_64", ("", ""), {"avx2"}),
            r"glibc 2\.28 or newer and found another C library",
        ),
        (
            ("Linux", "x86_64", ("glibc", "2.17"), {"avx2"}),
            r"glibc 2\.28 or newer and found glibc 2\.17",
        ),
        (("Linux", "x86_64", ("glibc", "2.36"), {"sse4_2"}), r"AVX2 and this one has none"),
    ],
)
def test_a_platform_without_wheels_is_named(
    platform: tuple[str, str, tuple[str, str], set[str]], said: str
) -> None:
    with pytest.raises(bootstrap.UnfitError, match=said):
        bootstrap.check_platform(*platform)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_linux_with_a_current_glibc_will_do(machine: str) -> None:
    bootstrap.check_platform("Linux", machine, ("glibc", "2.28"), {"avx2"})


def test_too_little_memory_is_named_with_what_is_needed() -> None:
    with pytest.raises(bootstrap.UnfitError, match=r"8 GiB of memory and found 3\.8"):
        bootstrap.check_memory(int(3.8 * GIB))
    bootstrap.check_memory(int(7.6 * GIB))


def test_a_missing_library_is_named_with_its_package() -> None:
    bootstrap.check_library("libc.so.6", "libc6")
    with pytest.raises(bootstrap.UnfitError, match=r"libnone\.so\.1 .*`apt-get install libnone1"):
        bootstrap.check_library("libnone.so.1", "libnone1")


def test_disk_is_needed_for_the_environment_and_less_once_it_is_there(tmp_path: Path) -> None:
    with pytest.raises(bootstrap.UnfitError, match=r"9 GiB free .* found 5\.0"):
        bootstrap.check_disk(5 * GIB, tmp_path, installed=False)
    bootstrap.check_disk(5 * GIB, tmp_path, installed=True)
    with pytest.raises(bootstrap.UnfitError, match=r"2 GiB free"):
        bootstrap.check_disk(1 * GIB, tmp_path, installed=True)


def fake_python(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


SAYS_311 = 'case "$2" in *version*) echo 3 11;; esac'


def test_another_python_on_the_path_is_found_where_the_default_is_too_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_new = fake_python(tmp_path / "default", "python3", "echo 3 14")
    fake_python(tmp_path / "bin", "python3.12", "exit 127")  # a shim without its Python
    good = fake_python(tmp_path / "bin", "python3.11", SAYS_311)
    monkeypatch.setattr(sys, "executable", str(too_new))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert bootstrap.find_python() == str(good)


def test_without_a_usable_python_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_old = fake_python(tmp_path, "python3", "echo 3 9")
    monkeypatch.setattr(sys, "executable", str(too_old))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        bootstrap.UnfitError, match=r"needs Python 3\.11 or 3\.12 .*apt-get install"
    ):
        bootstrap.find_python()


def test_a_python_without_venv_is_named_with_the_package_that_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = fake_python(tmp_path, "python3.11", f'{SAYS_311}; case "$2" in *venv*) exit 1;; esac')
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bootstrap.UnfitError, match=r"python3\.11-venv"):
        bootstrap.find_python()


@pytest.mark.parametrize(
    ("stamp", "wanted", "current"),
    [
        (None, {"cpu"}, False),
        ("{", {"cpu"}, False),
        (json.dumps({"fingerprint": "other", "extras": ["cpu"]}), {"cpu"}, False),
        (json.dumps({"fingerprint": "now", "extras": ["cpu"]}), {"cpu"}, True),
        (json.dumps({"fingerprint": "now", "extras": ["cpu"]}), {"cpu", "dev"}, False),
        (json.dumps({"fingerprint": "now", "extras": ["cpu", "dev"]}), {"cpu"}, True),
    ],
)
def test_an_environment_is_made_again_only_when_something_changed(
    tmp_path: Path, stamp: str | None, wanted: set[str], current: bool
) -> None:
    file = tmp_path / "stamp.json"
    if stamp is not None:
        file.write_text(stamp)
    assert bootstrap.is_current(file, "now", wanted) is current


def test_a_current_environment_runs_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = tmp_path / "stamp.json"
    stamp.write_text(json.dumps({"fingerprint": bootstrap.fingerprint(), "extras": ["cpu"]}))
    monkeypatch.setattr(bootstrap, "STAMP", stamp)
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: pytest.fail("ran a command"))
    bootstrap.environment({"cpu"}, sys.executable)


@pytest.mark.parametrize("has_own_torch", [True, False])
def test_torchs_index_is_asked_only_where_pip_finds_no_cpu_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_own_torch: bool
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(bootstrap, "_run", ran.append)
    monkeypatch.setattr(bootstrap, "_output", lambda _: "")
    monkeypatch.setattr(bootstrap, "_finds", lambda *_: has_own_torch)
    bootstrap.environment({"cpu", "dev"}, sys.executable)
    upgrade, install, uninstall, model = (command[3:] for command in ran)
    assert bootstrap.PIP in upgrade
    assert install[-1].endswith("[cpu,dev]")
    assert (bootstrap.CPU_TORCH_INDEX in install) is not has_own_torch
    assert uninstall[:2] == ["--disable-pip-version-check", "uninstall"]
    assert set(bootstrap.BREAK_CPU_TORCH) <= set(uninstall)
    assert "--no-deps" in model
    assert bootstrap.is_current(tmp_path / "stamp.json", bootstrap.fingerprint(), {"cpu", "dev"})


def test_a_gpu_machine_keeps_the_torchvision_that_fits_its_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(bootstrap, "_run", ran.append)
    monkeypatch.setattr(bootstrap, "_output", lambda _: "")
    bootstrap.environment({"gpu"}, sys.executable)
    assert not [command for command in ran if "uninstall" in command]


def test_an_unfit_machine_ends_with_one_sentence_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap.platform, "system", lambda: "Darwin")
    assert bootstrap.main(["check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_but_the_standard_library_is_needed() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "bootstrap.py"), "--help"]
    assert "check" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
