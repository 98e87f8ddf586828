"""Where the secret lies, who makes it, and that no copy of the database tells it."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from feedback import audit
from feedback.db import Database, DatabaseUnfit
from server.access.signing import (
    Signing,
    attach,
    create_secret,
    find_signing,
    get_signing,
    open_signing,
    renew_secret,
    secret_path,
)
from server.settings import Settings

GIVEN = "a" * 32


def settings(folder: Path, **more: str) -> Settings:
    folder.mkdir(exist_ok=True)
    return Settings(data=folder, **more)  # type: ignore[arg-type]


def open_(database: Database, chosen: Settings) -> Signing:
    with database.read() as session:
        return open_signing(chosen, database, session)


def write_entry(database: Database) -> None:
    with database.write() as session:
        audit.append(session, actor="a", action="b", subject="c")


def test_the_first_gateway_makes_a_secret_for_this_user_alone(
    sqlite_database: Database, tmp_path: Path
) -> None:
    here = settings(tmp_path / "data")
    assert find_signing(here) is None
    made = open_(sqlite_database, here)
    assert stat.S_IMODE(secret_path(here).stat().st_mode) == 0o600
    assert open_(sqlite_database, here) == made
    assert secret_path(here).read_text().strip() not in repr(made)


def test_gateways_that_start_at_once_make_one_secret(tmp_path: Path) -> None:
    here = settings(tmp_path / "data")
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: create_secret(here).tokens, range(8)))
    assert len(made) == 1
    assert [path.name for path in here.data.iterdir()] == ["secret"]


def test_another_machine_needs_the_same_secret(database: Database, tmp_path: Path) -> None:
    one, two = settings(tmp_path / "one"), settings(tmp_path / "two")
    name = open_(database, one).name
    write_entry(database)
    with pytest.raises(DatabaseUnfit, match=f"{name}.*copy .*two/secret from the machine"):
        open_(database, two)
    assert not secret_path(two).exists()
    secret_path(two).write_bytes(secret_path(one).read_bytes())
    assert open_(database, two).tokens == open_(database, one).tokens
    given = settings(tmp_path / "two", secret=secret_path(one).read_text().strip())
    assert open_(database, given).name == name


def test_a_new_secret_ends_tokens_and_older_entries_stay_verified(
    sqlite_database: Database, tmp_path: Path
) -> None:
    here = settings(tmp_path / "data")
    first = open_(sqlite_database, here)
    write_entry(sqlite_database)
    second = attach(sqlite_database, renew_secret(here))
    write_entry(sqlite_database)
    assert second.tokens != first.tokens
    assert [*second.seal.keys] == [second.name, first.name]
    with sqlite_database.read() as session:
        assert audit.verify(session).entries == 2


def test_a_secret_of_the_settings_is_used_and_not_written(
    sqlite_database: Database, tmp_path: Path
) -> None:
    here = settings(tmp_path / "data", secret=f"{GIVEN},{'b' * 32}")
    assert len(open_(sqlite_database, here).seal.keys) == 2
    assert not secret_path(here).exists()
    with pytest.raises(DatabaseUnfit, match="in the setting `secret`"):
        renew_secret(here)
    with pytest.raises(DatabaseUnfit, match="fewer than 32 characters: take `openssl"):
        find_signing(settings(tmp_path / "data", secret="hunter2"))


def test_without_a_secret_nothing_is_signed_in_silence(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnfit, match="run `burnish db upgrade`"):
        get_signing(settings(tmp_path / "data"))
