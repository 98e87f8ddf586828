"""The table of clients: pinned, documented, and made once. No client is installed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.clients import environments
from tests.clients.environments import (
    CLIENTS,
    OPEN_WEBUI,
    ROOT,
    Client,
    NotInstalled,
    are_required,
    make,
)

pytestmark = pytest.mark.processes

ALL = [*CLIENTS.values(), OPEN_WEBUI]


def test_every_package_has_one_exact_version() -> None:
    for client in ALL:
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in client.python)
        assert all(re.fullmatch(r"[\w-]+@[\d.]+", package) for package in client.npm)


def test_the_document_names_the_versions_that_are_tested() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = text.partition("\n## Clients that are tested\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([\w-]+ [\d.]+)`", table))
    assert documented == {client.version for client in ALL}


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of no packages, whose environment lies in a folder of the test's."""
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    return Client("nothing", "nothing.py", python=["--requirement=/dev/null"])


def test_an_environment_is_made_once_and_anew_for_another_table(nothing: Client) -> None:
    make(nothing)
    mark = nothing.folder / "mark"
    mark.touch()
    make(nothing)
    assert mark.exists()
    make(Client("nothing", "nothing.py", python=["--requirement=/dev/null", "--pre"]))
    assert not mark.exists()


def test_what_cannot_be_installed_is_named_and_tried_again(
    nothing: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No index and no folder of wheels: as on a machine without a network.
    for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = Client("nothing", "nothing.py", python=["openai==0.0.1"])
    for _ in range(2):
        with pytest.raises(NotInstalled, match=r"openai==0\.0\.1"):
            make(missing)
    assert not (tmp_path / "nothing" / "made.json").exists()


@pytest.mark.parametrize(
    ("value", "required"), [(None, False), ("", False), ("false", False), ("1", True)]
)
def test_ci_makes_a_failed_installation_a_failure(
    value: str | None, required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("CI", raising=False)
    else:
        monkeypatch.setenv("CI", value)
    assert are_required() is required
