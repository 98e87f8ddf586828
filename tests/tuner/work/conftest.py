"""The home of a worker on SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.db import Database
from tests.tuner.work.home import Home, make_home


@pytest.fixture
def home(sqlite_database: Database, tmp_path: Path) -> Home:
    return make_home(sqlite_database, tmp_path)
