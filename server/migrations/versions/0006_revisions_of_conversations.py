"""A judgement of a conversation moves one row, however many answers it has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_COLUMNS = (("conversations", "revision"), ("extractions", "conversation_revision"))


def upgrade() -> None:
    for table, column in _COLUMNS:
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column(column, sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    for table, column in _COLUMNS:
        op.drop_column(table, column)  # a copy of the table would take answers along (ON DELETE)
