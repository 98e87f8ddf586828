"""A release has a suffix: what the person who tuned it calls it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Both databases add a column that may be null without copying the table.
    op.add_column("releases", sa.Column("suffix", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("releases", "suffix")
