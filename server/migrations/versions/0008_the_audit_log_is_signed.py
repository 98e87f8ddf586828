"""Entries of the audit log say which secret signed them; no secret is kept in the database."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

import feedback.db

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit", sa.Column("signed_by", sa.String(), nullable=True))
    op.drop_table("secrets")


def downgrade() -> None:
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("created_at", feedback.db.UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_secrets")),
    )
    op.drop_column("audit", "signed_by")
