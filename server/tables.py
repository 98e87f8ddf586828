"""Tables of the gateway: keys, requests that may be repeated, and who leads."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKeyConstraint, Index
from sqlalchemy.orm import Mapped, mapped_column

from feedback.db import Base, CanonicalJson, UtcDateTime, now


class Key(Base):
    """An API key. Only a hash of it is kept."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)  #: key_…
    sha256: Mapped[str] = mapped_column(unique=True)
    user: Mapped[str] = mapped_column(index=True)
    name: Mapped[str | None]
    scopes: Mapped[list[str]] = mapped_column(CanonicalJson)
    deployments: Mapped[list[str] | None] = mapped_column(CanonicalJson)  #: None: all
    end_users: Mapped[bool] = mapped_column(default=False)
    header_only: Mapped[bool]  #: bodies name no end user
    #: of `limits.Limits`, where they differ from the settings; a null in it lifts a limit
    limits: Mapped[dict[str, int | None] | None] = mapped_column(CanonicalJson)
    created_by: Mapped[str | None]  #: a user; None: made on the machine itself
    created_by_key: Mapped[str | None]  #: the key that this user had
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class IdempotentRequest(Base):
    """A request that came with an `Idempotency-Key`: its body's hash, and its reply."""

    __tablename__ = "idempotent_requests"

    caller: Mapped[str] = mapped_column(primary_key=True)  #: key id, of a token also its answer
    key: Mapped[str] = mapped_column(primary_key=True)  #: the header's value
    route: Mapped[str]  #: method and path
    body_sha256: Mapped[str]
    owner: Mapped[str]  #: whoever runs it: a request that was taken over writes no reply
    status: Mapped[int | None]  #: None: still running
    reply: Mapped[Any | None] = mapped_column(CanonicalJson)
    beat_at: Mapped[datetime] = mapped_column(UtcDateTime)  #: last sign of life while it runs
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now, index=True)


class IdempotentSubject(Base):
    """An answer or conversation that a kept reply is about: the reply goes with it."""

    __tablename__ = "idempotent_subjects"
    __table_args__ = (
        ForeignKeyConstraint(
            ["caller", "key"],
            ["idempotent_requests.caller", "idempotent_requests.key"],
            ondelete="CASCADE",
        ),
        Index("ix_idempotent_subjects_caller_key", "caller", "key"),  # the cascade's
    )

    subject: Mapped[str] = mapped_column(primary_key=True)  #: first: it is what is looked for
    caller: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)


class Control(Base):
    """One row: which gateway leads, and how often what the leader writes has changed."""

    __tablename__ = "control"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(BigInteger)  #: grows with every write of a leader
    term: Mapped[int] = mapped_column(BigInteger)  #: grows with every leader
    leader: Mapped[str]  #: the gateway that began the term; it may have ended since
