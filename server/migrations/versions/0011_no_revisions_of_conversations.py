"""A judgement of a whole conversation teaches nothing, so it makes nothing be extracted anew."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_COLUMNS = (("conversations", "revision"), ("extractions", "conversation_revision"))


def upgrade() -> None:
    for table, column in _COLUMNS:
        op.drop_column(table, column)  # a copy of the table would take answers along (ON DELETE)


def downgrade() -> None:
    for table, column in _COLUMNS:
        op.add_column(table, sa.Column(column, sa.Integer(), nullable=False, server_default="0"))
