"""Kept replies are found by what they are about, instead of by a search in their text.

Those that are there already are found no more; they are kept for a day at most.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotent_subjects",
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("caller", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("subject", "caller", "key", name=op.f("pk_idempotent_subjects")),
        sa.ForeignKeyConstraint(
            ["caller", "key"],
            ["idempotent_requests.caller", "idempotent_requests.key"],
            name=op.f("fk_idempotent_subjects_caller_idempotent_requests"),
            ondelete="CASCADE",
        ),
        sa.Index("ix_idempotent_subjects_caller_key", "caller", "key"),
    )


def downgrade() -> None:
    op.drop_table("idempotent_subjects")
