"""A person has one verdict about a choice, and one about a pair, whatever names its source.

Where there were several the newest stands, and the others become its history. The unique
constraints by source id stay beside the new indexes: to drop them SQLite would copy the tables, and
dropping the old ones deletes all history with them.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

from feedback.db import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_HUMAN = sa.text("source_type = 'human'")
_CHOICE = ("target_id", "choice_index", "kind", "name", "person_id")
_PAIR = ("person_id", "answer_a", "choice_a", "answer_b", "choice_b")


def upgrade() -> None:
    _merge("judgements", "judgement_revisions", "judgement_id", _CHOICE)
    _merge("comparisons", "comparison_revisions", "comparison_id", _PAIR)
    for name, columns in (("judgements", _CHOICE), ("comparisons", _PAIR)):
        op.create_index(
            f"uq_{name}_human",
            name,
            list(columns),
            unique=True,
            sqlite_where=_HUMAN,
            postgresql_where=_HUMAN,
        )


def downgrade() -> None:
    op.drop_index("uq_comparisons_human", "comparisons")
    op.drop_index("uq_judgements_human", "judgements")


def _merge(name: str, history: str, owner: str, columns: tuple[str, ...]) -> None:
    """Make one row of all that a person said about the same thing."""
    connection = op.get_bind()
    times = ("created_at", "updated_at")
    verdicts = sa.table(
        name,
        sa.column("id"),
        sa.column("revision"),
        sa.column("source_type"),
        *map(sa.column, columns),
        *(sa.column(at, UtcDateTime()) for at in times),
    )
    said = sa.table(
        history, sa.column(owner), sa.column("revision"), sa.column("at", UtcDateTime())
    )
    rows = sa.table("dataset_rows", sa.column("judgement_id"))
    key = [verdicts.c[column] for column in columns]
    human = verdicts.c.source_type == "human"
    several = sa.select(*key).where(human).group_by(*key).having(sa.func.count() > 1)
    for group in connection.execute(several).all():
        same = [column == value for column, value in zip(key, group, strict=True)]
        found = connection.execute(
            sa.select(verdicts).where(human, *same).order_by(verdicts.c.updated_at, verdicts.c.id)
        ).all()
        newest, older = found[-1], found[:-1]
        order = [row.id for row in found]
        moments = sorted(
            connection.execute(sa.select(said).where(said.c[owner].in_(order))).all(),
            key=lambda moment: (moment.at, order.index(moment[0]), moment.revision),
        )
        # By way of numbers that nobody has: each pair of row and revision stands once.
        for number, moment in enumerate(moments, start=1):
            connection.execute(
                said.update()
                .where(said.c[owner] == moment[0], said.c.revision == moment.revision)
                .values({owner: newest.id, "revision": -number})
            )
        connection.execute(
            said.update().where(said.c[owner] == newest.id).values(revision=-said.c.revision)
        )
        connection.execute(
            verdicts.update()
            .where(verdicts.c.id == newest.id)
            .values(revision=len(moments), created_at=min(row.created_at for row in found))
        )
        gone = [row.id for row in older]
        connection.execute(
            rows.update().where(rows.c.judgement_id.in_(gone)).values(judgement_id=newest.id)
        )
        connection.execute(verdicts.delete().where(verdicts.c.id.in_(gone)))
        _touch_answers(connection, dict(zip(columns, group, strict=True)))


def _touch_answers(connection: sa.Connection, of: dict[str, Any]) -> None:
    """Have what was extracted from these answers extracted anew."""
    answers = sa.table(
        "answers", sa.column("id"), sa.column("conversation_id"), sa.column("revision")
    )
    ids = [of[column] for column in ("target_id", "answer_a", "answer_b") if column in of]
    connection.execute(
        answers.update()
        .where(answers.c.id.in_(ids) | answers.c.conversation_id.in_(ids))
        .values(revision=answers.c.revision + 1)
    )
