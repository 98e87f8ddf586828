"""The data directory: private, or refused with the part of its path that is in the way."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from server.data_folder import DataUnfit, cache_variables, prepare_data
from server.settings import Settings


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    prepare_data(Settings(data=tmp_path / "a" / "b"))
    for folder in (tmp_path / "a" / "b", tmp_path / "a" / "b" / "run"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_blank_and_an_umlaut_are_no_matter(tmp_path: Path) -> None:
    prepare_data(Settings(data=tmp_path / "Früh stück"))
    assert (tmp_path / "Früh stück" / "run").is_dir()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataUnfit, match="file' is a file; give another one as DATA"):
        prepare_data(Settings(data=tmp_path / name))


def test_a_place_where_nothing_can_be_made_is_refused() -> None:
    with pytest.raises(DataUnfit, match="'/proc/burnish' can't be used"):
        prepare_data(Settings(data=Path("/proc/burnish")))


@pytest.mark.parametrize("home", ["/", "", "/nowhere/at/all"])
def test_without_a_home_all_caches_lie_in_the_data(
    tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    made = cache_variables(tmp_path, {"HOME": home, "VLLM_CACHE_ROOT": "/elsewhere"})
    assert made.pop("HOME") == str(tmp_path / "cache")
    assert "VLLM_CACHE_ROOT" not in made
    assert all(value.startswith(str(tmp_path / "cache")) for value in made.values())


def test_a_home_that_can_be_written_stays(tmp_path: Path) -> None:
    assert "HOME" not in cache_variables(tmp_path, {"HOME": str(tmp_path)})
