"""Evaluations keep no copy of people's prompts: the text of what they asked and were answered goes.

The rows stay, as those of any request that asked for no text to be kept.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_ANSWERS = sa.table("answers", sa.column("id"), sa.column("kind"), sa.column("stored", sa.Boolean))
_TEXTS = sa.table("answer_texts", sa.column("answer_id"))


def upgrade() -> None:
    internal = sa.select(_ANSWERS.c.id).where(_ANSWERS.c.kind == "internal")
    op.execute(sa.delete(_TEXTS).where(_TEXTS.c.answer_id.in_(internal)))
    op.execute(sa.update(_ANSWERS).where(_ANSWERS.c.kind == "internal").values(stored=sa.false()))


def downgrade() -> None:
    """What was deleted does not come back."""
