"""The database's schema: Alembic's migrations, run and compared with what this version needs."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.orm import Session

from feedback.db import Database, DatabaseUnfit

MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK = 0x6275726E  # one upgrade at a time on PostgreSQL


class UpgradeError(Exception):
    """The database belongs to something else than these settings say.

    The message says what to do.
    """


def migrate(database: Database, revision: str = "head") -> None:
    """Run the migrations that are missing, in one transaction.

    Raises UpgradeError where a newer Burnish was here.
    """
    config = _config()
    with database.write() as session:
        wait_for_other_upgrades(database, session)
        connection = session.connection()
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in _known():
            raise UpgradeError(_too_new(found))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def check_schema(database: Database) -> str:
    """The schema's revision. Raises DatabaseUnfit unless it is the one of this version."""
    with database.read() as session:
        found = MigrationContext.configure(session.connection()).get_current_revision()
    known = _known()
    if found == known[0]:
        return found
    if found is not None and found not in known:
        raise DatabaseUnfit(_too_new(found))
    raise DatabaseUnfit(
        f"the database has {'no schema' if found is None else f'the schema {found}'}, and this "
        f"Burnish works with {known[0]}: run `burnish db upgrade`"
    )


def wait_for_other_upgrades(database: Database, session: Session) -> None:
    """One upgrade at a time, until the transaction ends; SQLite has its own lock."""
    if not database.is_sqlite:
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _known() -> list[str]:
    """All revisions, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]


def _too_new(found: str) -> str:
    return (
        f"the database has the schema {found}, which a newer Burnish made (this one knows "
        f"{_known()[0]}): install that one again, or restore a backup from before it"
    )
