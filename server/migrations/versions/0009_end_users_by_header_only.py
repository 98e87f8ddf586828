"""A key whose end users a header alone names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("header_only", sa.Boolean(), nullable=True))
    op.execute(sa.text("UPDATE keys SET header_only = false"))
    with op.batch_alter_table("keys") as keys:
        keys.alter_column("header_only", existing_type=sa.Boolean(), nullable=False)


def downgrade() -> None:
    op.drop_column("keys", "header_only")
