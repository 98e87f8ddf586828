"""Alembic's entry: runs the migrations on the connection that the upgrade hands over."""

from __future__ import annotations

from alembic import context

import feedback.tables  # noqa: F401 - the metadata has the tables of what was imported
import server.tables  # noqa: F401 - as above
import tuner.tables  # noqa: F401 - as above
from feedback.db import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
