"""Fewer indexes on answers: each one costs every answer a page of the write-ahead log.

`release` was looked for by nothing, a conversation's person by its unique constraint as well, and
of (gateway, status) only the answers that have begun and not ended are ever wanted.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_STARTED = sa.text("status = 'started'")


def upgrade() -> None:
    op.drop_index("ix_answers_release_id", "answers")
    op.drop_index("ix_answers_gateway_status", "answers")
    op.drop_index("ix_conversations_person_id", "conversations")
    op.create_index(
        "ix_answers_started",
        "answers",
        ["gateway"],
        sqlite_where=_STARTED,
        postgresql_where=_STARTED,
    )


def downgrade() -> None:
    op.drop_index("ix_answers_started", "answers")
    op.create_index("ix_conversations_person_id", "conversations", ["person_id"])
    op.create_index("ix_answers_gateway_status", "answers", ["gateway", "status"])
    op.create_index("ix_answers_release_id", "answers", ["release", "id"])
