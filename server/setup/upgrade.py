"""`burnish db upgrade`: schema, keys and the first deployment, made where they are missing.

Owns: what must be in a database before a gateway starts, and `DATA/credentials` for the command
line. Every step looks first, so running it again changes nothing. Does not own: the tables' history
(`migrations/`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback import audit
from feedback.db import Database
from feedback.errors import BadRequest, Conflict
from server.access.keyring import hash_key
from server.access.keys import create_key
from server.access.scopes import Scope
from server.access.signing import attach, get_signing, open_signing, renew_secret
from server.processes.children import write_private_json
from server.schema import UpgradeError, migrate, wait_for_other_upgrades
from server.settings import Settings
from server.tables import Key
from tuner.base_models import BaseModel
from tuner.deployments import create_deployment, list_deployments
from tuner.releases import get_release

DEFAULT_ALIASES = ("gpt-4o-mini",)


ADMIN_USER = "admin"


WORKER_USER = "burnish-worker"


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What was made: None and False where it was there before."""

    admin_key: str | None = None
    deployment: str | None = None


def upgrade(
    settings: Settings, database: Database, base: BaseModel, *, url: str, new_secret: bool = False
) -> Upgraded:
    """Bring schema, keys and the first deployment to what a gateway needs; `url` is its address.

    Raises UpgradeError where a deployment stands on another base than the engine serves, or a newer
    Burnish was here.
    """
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    migrate(database)
    with database.write() as session:
        wait_for_other_upgrades(database, session)
        deployment = _first_deployment(session, settings, base)
        # After what may refuse: a new secret stays, whatever becomes of this transaction.
        _sign(settings, database, session, anew=new_secret)
        if deployment is not None:
            audit.append(session, actor="local", action="deployment_created", subject=deployment)
        _internal_key(session, settings)
        admin_key = _first_admin_key(session, settings)
        if admin_key is not None:
            # Before the commit: a key that stands nowhere could never be used.
            write_private_json(settings.data / "credentials", {"url": url, "api_key": admin_key})
    return Upgraded(admin_key=admin_key, deployment=deployment)


def recover_admin_key(settings: Settings, database: Database, *, url: str) -> str:
    """A new admin key, for whoever lost theirs and may read the data directory."""
    attach(database, get_signing(settings))
    with database.write() as session:
        key, token = create_key(session, user=ADMIN_USER, scopes=[Scope.ADMIN], name="recovered")
        audit.append(session, actor="local", action="key_recovered", subject=key.id)
        write_private_json(settings.data / "credentials", {"url": url, "api_key": token})
    return token


def _sign(settings: Settings, database: Database, session: Session, *, anew: bool) -> None:
    """Sign what is done from now on, and have the audit log say since when."""
    if anew:
        signing = attach(database, renew_secret(settings))
    else:
        signing = open_signing(settings, database, session)
    session.info.update(database.info)  # this session is older than the secret
    if audit.newest_name(session) != signing.name:
        audit.append(session, actor="local", action="audit_signed", subject=signing.name)


def _first_deployment(session: Session, settings: Settings, base: BaseModel) -> str | None:
    existing = list_deployments(session)
    for deployment in existing:
        origin = get_release(session, f"{deployment.name}@0")
        if (origin.base_model, origin.base_revision) != (base.name, base.revision):
            raise UpgradeError(
                f"deployment {deployment.name!r} stands on {origin.base_model!r} "
                f"({origin.base_revision[:19]}), but the model here is {base.name!r} "
                f"({base.revision[:19]}): start with that model, or with another DATA"
            )
        if origin.template_hash not in (None, base.template_hash):
            raise UpgradeError(
                f"the chat template of {base.name!r} has changed since deployment "
                f"{deployment.name!r} was made, and what was learned under the old one would be "
                "served under another: put it back, or start with another DATA"
            )
    if existing:
        return None
    try:
        create_deployment(
            session,
            name=settings.deployment,
            base_model=base.name,
            base_revision=base.revision,
            template_hash=base.template_hash,
            aliases=[
                alias for alias in DEFAULT_ALIASES if alias not in (base.name, settings.deployment)
            ],
            created_by="local",
        )
    except (BadRequest, Conflict) as error:
        raise UpgradeError(
            f"the first deployment can't be made: {error.message} "
            "The settings model.name and deployment give the model and it other names."
        ) from None
    return settings.deployment


def _internal_key(session: Session, settings: Settings) -> None:
    """The worker's key: given by the settings, else in `DATA/run/internal.key`."""
    if settings.worker.api_key is not None:
        token: str | None = settings.worker.api_key.get_secret_value()
    else:
        token = read_internal_key(settings)
    if token is not None:
        known = select(Key.id).where(Key.sha256 == hash_key(token), Key.revoked_at.is_(None))
        if session.scalar(known) is not None:
            return
    _, made = create_key(session, user=WORKER_USER, scopes=[Scope.INTERNAL], token=token)
    if settings.worker.api_key is None:
        _write_private(settings.run_dir / "internal.key", made + "\n")


def read_internal_key(settings: Settings) -> str | None:
    """What `DATA/run/internal.key` holds, or None."""
    try:
        return (settings.run_dir / "internal.key").read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None


def _first_admin_key(session: Session, settings: Settings) -> str | None:
    keys = session.scalars(select(Key).where(Key.revoked_at.is_(None)))
    if any(Scope.ADMIN in key.scopes for key in keys):
        return None
    if session.scalar(select(func.count()).select_from(Key).where(Key.user == ADMIN_USER)):
        return None  # revoked by somebody; `burnish keys recover` makes another
    given = settings.bootstrap_key
    key, token = create_key(
        session,
        user=ADMIN_USER,
        scopes=[Scope.ADMIN],
        name="first",
        token=None if given is None else given.get_secret_value(),
    )
    audit.append(session, actor="local", action="key_created", subject=key.id)
    return token


def _write_private(path: Path, content: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(content)
