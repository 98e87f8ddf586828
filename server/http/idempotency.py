"""Requests that may be sent again: `Idempotency-Key`.

Owns: the rows of `idempotent_requests`, and the rules. The first request with a key runs and leaves
its reply; the same request again gets that reply; another request under the key is refused. Only
replies of success are kept, for a day: what failed may be tried again. A request whose gateway
died leaves a row that still says `running`; a copy takes over when another copy, a minute before by
this process's own clock, found the same last sign of life. Does not own: how a reply is caught
(`endpoints/bodies.py`).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.orm import Session

from feedback.db import insert_into, new_id, now
from feedback.errors import BadRequest
from feedback.tables import Answer, Conversation
from server.errors import StillRunning
from server.tables import IdempotentRequest, IdempotentSubject

HEADER = "idempotency-key"
REPLAYED_HEADER = "idempotent-replayed"

KEPT = timedelta(hours=24)
KEPT_RUNNING = timedelta(days=7)  #: of a dead gateway, where no copy came
STALLED_SECONDS = 60.0
BEAT_SECONDS = 15.0

MOST_REMOVED = 500  #: in one transaction
_MOST_WATCHED = 10_000
_ROUTES = frozenset({"/v1/feedback", "/v1/comparisons", "/v1/fine_tuning/jobs"})
_SHOWN_ONCE = ("key", "token")


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request under its key, as one gateway runs it."""

    caller: str
    key: str
    route: str
    body_sha256: str
    owner: str


@dataclass(frozen=True, slots=True)
class KeptReply:
    """What the first request was answered with."""

    status: int
    body: Any


class Watch:
    """Tells which running requests have shown no sign of life, by a clock that never jumps.

    Of a sign it is only seen whether it is another one: the times of other machines, and this one's
    before its clock was set, mean nothing here.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._seen: dict[tuple[str, str], tuple[tuple[str, datetime], float]] = {}
        self._lock = threading.Lock()

    def has_stalled(self, row: IdempotentRequest) -> bool:
        """Whether the same sign was seen `STALLED_SECONDS` ago, or earlier."""
        name, sign, at = (row.caller, row.key), (row.owner, row.beat_at), self._monotonic()
        with self._lock:
            before = self._seen.get(name)
            if before is not None and before[0] == sign:
                return at - before[1] >= STALLED_SECONDS
            self._seen[name] = (sign, at)
            if len(self._seen) > _MOST_WATCHED:
                del self._seen[next(iter(self._seen))]
        return False


_WATCH = Watch()  #: this process's


def takes_key(method: str, path: str) -> bool:
    """Whether requests of a route (`path` its template) may be repeated under a key."""
    return method in ("POST", "PATCH", "DELETE") and (
        path.startswith("/admin/") or (method == "POST" and path in _ROUTES)
    )


def build_attempt(caller: str, key: str, method: str, path: str, body: bytes) -> Attempt:
    """Raises BadRequest for a key that is none; `path` is the request's own."""
    if not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
        raise BadRequest(
            "an Idempotency-Key has 1 to 255 printable ASCII characters", param="Idempotency-Key"
        )
    return Attempt(
        caller=caller,
        key=key,
        route=f"{method} {path}",
        body_sha256=hashlib.sha256(body).hexdigest(),
        owner=new_id(""),
    )


def begin(
    session: Session, attempt: Attempt, *, at: datetime | None = None, watch: Watch = _WATCH
) -> KeptReply | None:
    """Take the key; None when the request is now the caller's to run, else what to answer.

    Raises BadRequest for another request under the key, StillRunning.
    """
    at = at or now()
    remove_old(session, at=at)
    made = session.execute(
        insert_into(session, IdempotentRequest)
        .values(
            caller=attempt.caller,
            key=attempt.key,
            route=attempt.route,
            body_sha256=attempt.body_sha256,
            owner=attempt.owner,
            status=None,
            reply=None,
            beat_at=at,
            created_at=at,
        )
        .on_conflict_do_nothing(index_elements=["caller", "key"])
        .returning(IdempotentRequest.owner)
    )
    if made.first() is not None:
        return None
    row = session.scalars(
        select(IdempotentRequest)
        .where(IdempotentRequest.caller == attempt.caller, IdempotentRequest.key == attempt.key)
        .with_for_update()
    ).one_or_none()
    if row is None:
        raise StillRunning("the first request with this Idempotency-Key just failed; try again")
    is_old = row.status is not None and row.created_at <= at - KEPT
    if not is_old and (row.route, row.body_sha256) != (attempt.route, attempt.body_sha256):
        raise BadRequest(
            f"the Idempotency-Key {attempt.key[:80]!r} was used for another request; give each "
            "its own",
            param="Idempotency-Key",
            code="idempotency_mismatch",
        )
    if not is_old and row.status is not None:
        return KeptReply(row.status, row.reply)
    if not is_old and not watch.has_stalled(row):
        raise StillRunning("the first request with this Idempotency-Key is still running")
    row.route, row.body_sha256, row.owner = attempt.route, attempt.body_sha256, attempt.owner
    row.status, row.reply, row.beat_at = None, None, at
    row.created_at = at
    return None


def beat(session: Session, attempt: Attempt) -> None:
    """Say that the request is still being run."""
    session.execute(update(IdempotentRequest).where(*_own(attempt)).values(beat_at=now()))


def keep(session: Session, attempt: Attempt, reply: KeptReply) -> None:
    """Leave the reply for the next copies. What is shown once (a new key) is left out of it.

    What it is about may have been deleted meanwhile: then nothing is left.
    """
    body = reply.body
    if isinstance(body, dict):
        body = {**body, **{name: None for name in _SHOWN_ONCE if name in body}}
    subjects = _subjects_of(body)
    if not _lock_subjects(session, subjects):
        give_up(session, attempt)
        return
    kept = session.execute(
        update(IdempotentRequest)
        .where(*_own(attempt))
        .values(status=reply.status, reply=body)
        .returning(IdempotentRequest.key)
    )
    if kept.first() is not None:
        session.add_all(
            IdempotentSubject(subject=subject, caller=attempt.caller, key=attempt.key)
            for subject in subjects
        )


def give_up(session: Session, attempt: Attempt) -> None:
    """The request failed: its next copy runs anew."""
    session.execute(delete(IdempotentRequest).where(*_own(attempt)))


def forget(session: Session, subjects: Collection[str]) -> None:
    """Remove kept replies about answers and conversations that are being deleted.

    They hold what was said of them.
    """
    about = select(IdempotentSubject.caller, IdempotentSubject.key).where(
        IdempotentSubject.subject.in_(subjects)
    )
    session.execute(
        delete(IdempotentRequest).where(
            tuple_(IdempotentRequest.caller, IdempotentRequest.key).in_(about)
        )
    )


def remove_old(session: Session, *, at: datetime | None = None) -> int:
    """Remove replies that are older than a day, and what never got one, the oldest first.

    Not all at once; how many.
    """
    at = at or now()
    # PostgreSQL: rows that another request holds are left to the next one.
    old = (
        select(IdempotentRequest.caller, IdempotentRequest.key)
        .where(
            IdempotentRequest.created_at <= at - KEPT,
            IdempotentRequest.status.is_not(None)
            | (IdempotentRequest.created_at <= at - KEPT_RUNNING),
        )
        .order_by(IdempotentRequest.created_at)
        .limit(MOST_REMOVED)
        .with_for_update(skip_locked=True)
    )
    found = session.execute(old).all()
    for caller, key in found:
        session.execute(
            delete(IdempotentRequest).where(
                IdempotentRequest.caller == caller, IdempotentRequest.key == key
            )
        )
    return len(found)


def _subjects_of(body: Any) -> set[str]:
    """The answers and conversations that a reply names as what it is about."""
    if not isinstance(body, dict):
        return set()
    named = [body.get("completion_id"), body.get("conversation_id")]
    several = body.get("completion_ids")
    named += several if isinstance(several, list) else []
    return {name for name in named if isinstance(name, str)}


def _lock_subjects(session: Session, subjects: Collection[str]) -> bool:
    """Whether all of them are there, and stay until the transaction ends."""
    if not subjects:
        return True
    found = 0
    for table in (Conversation, Answer):
        there = select(table.id).where(table.id.in_(subjects)).order_by(table.id)
        found += len(session.execute(there.with_for_update(key_share=True, read=True)).all())
    return found == len(subjects)


def _own(attempt: Attempt) -> tuple[Any, ...]:
    return (
        IdempotentRequest.caller == attempt.caller,
        IdempotentRequest.key == attempt.key,
        IdempotentRequest.owner == attempt.owner,
        IdempotentRequest.status.is_(None),
    )
