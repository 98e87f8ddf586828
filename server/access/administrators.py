"""What an administrator may do about keys: those of other people, within the limits of their own.

Owns: which keys an administrator sees, makes and revokes, and that the last one stays. Does not
own: what a key is (`keys.py`). Functions take the session first and never commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from feedback.errors import Conflict, Forbidden, NotFound
from server.access import keys
from server.access.keyring import Caller
from server.access.scopes import Scope
from server.access.visibility import append_audit, get_deployment
from server.tables import Key


def list_keys(
    session: Session, caller: Caller, *, after: str | None = None, limit: int = 20
) -> tuple[list[Key], bool]:
    """A page of the keys in force that the caller sees, newest first, and whether more follow."""
    rows = [row for row in _list_in_force(session) if _sees(caller, row)]
    if after is not None:
        rows = [row for row in rows if row.id < after]
    return rows[:limit], len(rows) > limit


def create_key(
    session: Session,
    caller: Caller,
    *,
    user: str,
    scopes: Sequence[str],
    deployments: Sequence[str] | None,
    end_users: bool,
    header_only: bool,
    limits: Mapping[str, int | None] | None,
    name: str | None,
) -> tuple[Key, str]:
    """Make a key for `user`; the second value is the key itself, which is kept nowhere.

    Raises Forbidden for one that reaches further than the caller's, NotFound for a deployment.
    """
    allowed = caller.key.deployments
    if deployments is None and allowed is not None:
        raise Forbidden(
            f"this key is limited to {', '.join(allowed) or 'no deployment'} and cannot make one "
            "that is not; name some of these in 'deployments'"
        )
    for deployment in deployments or ():
        get_deployment(session, caller, deployment, param="deployments")
    _check_user(session, caller, user)
    row, token = keys.create_key(
        session,
        user=user,
        scopes=scopes,
        deployments=deployments,
        end_users=end_users,
        header_only=header_only,
        limits=limits,
        name=name,
        created_by=caller.key.user,
        created_by_key=caller.key.id,
    )
    append_audit(
        session,
        caller,
        "key_created",
        row.id,
        user=row.user,
        scopes=row.scopes,
        deployments=row.deployments,
        end_users=row.end_users,
        header_only=row.header_only,
        limits=row.limits,
    )
    return row, token


def revoke_key(session: Session, caller: Caller, key_id: str) -> Key:
    """Put a key out of force. Raises NotFound, and Conflict for the last one that rules all."""
    in_force = _list_in_force(session, hold=True)
    row = next((key for key in in_force if key.id == key_id and _sees(caller, key)), None)
    if row is None:
        raise NotFound(f"no key {key_id!r} is in force")
    if [key for key in in_force if _rules_all(key)] == [row]:
        raise Conflict(
            f"{key_id!r} is the last admin key; make another before you revoke it",
            code="last_admin_key",
        )
    keys.revoke_key(session, row.id)
    append_audit(session, caller, "key_revoked", row.id, user=row.user)
    return row


def _check_user(session: Session, caller: Caller, user: str) -> None:
    """Refuse a user who has or had a key that a limited administrator may not see.

    A second key would speak as the same person, whose uploads belong to no deployment. Raises
    Forbidden.
    """
    known = session.scalars(select(Key).where(Key.user == user))
    if not all(_sees(caller, row) for row in known):
        raise Forbidden(
            f"{user!r} has keys beyond {', '.join(caller.key.deployments or ())}, to which this "
            "key is limited; choose another 'user', or ask an administrator of all deployments"
        )


def _list_in_force(session: Session, *, hold: bool = False) -> list[Key]:
    """All keys but the workers', newest first; `hold` keeps others from revoking meanwhile."""
    query = select(Key).where(Key.revoked_at.is_(None)).order_by(Key.id.desc())
    rows = session.scalars(query.with_for_update() if hold else query)
    return [row for row in rows if Scope.INTERNAL not in row.scopes]


def _sees(caller: Caller, row: Key) -> bool:
    """A limited administrator handles keys within the same limits."""
    allowed = caller.key.deployments
    return allowed is None or (row.deployments is not None and {*row.deployments} <= {*allowed})


def _rules_all(row: Key) -> bool:
    return Scope.ADMIN in row.scopes and row.deployments is None
