"""Who made a key: which key that user had, and in the audit log beside each actor."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import feedback.db

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("created_by_key", sa.String(), nullable=True))
    op.add_column("audit", sa.Column("made_by", feedback.db.CanonicalJson(), nullable=True))


def downgrade() -> None:
    op.drop_column("audit", "made_by")
    op.drop_column("keys", "created_by_key")
