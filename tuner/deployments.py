"""Deployments: public model names, their other names, and how they are made.

Owns: their rows and aliases, and that a name belongs to one thing. Does not own what answers under
a name (`releases.py`) or how that changes (`moves.py`). Functions take the session first and never
commit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from feedback.errors import BadRequest, Conflict, NotFound
from tuner.tables import Deployment, DeploymentAlias, Release

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def create_deployment(
    session: Session,
    *,
    name: str,
    base_model: str,
    base_revision: str,
    template_hash: str | None,
    system_prompt: str | None = None,
    sampling: dict[str, Any] | None = None,
    aliases: Sequence[str] = (),
    policies: dict[str, Any] | None = None,
    created_by: str | None = None,
) -> Deployment:
    """Make a public name, answered by `<name>@0`: the base without adapter.

    Raises `BadRequest` for a name or alias that can't be one, `Conflict` for one that is taken.
    """
    if not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name!r} can't name a deployment: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit.",
            param="name",
        )
    _refuse_taken(session, name, base_model=base_model, param="name")
    deployment = Deployment(name=name, base_model=base_model, policies=policies or {})
    try:
        with session.begin_nested():
            session.add(deployment)
            session.flush()
    except IntegrityError:
        raise _taken(name, "a deployment", "name") from None
    session.add(
        Release(
            name=f"{name}@0",
            deployment=name,
            number=0,
            engine_name=base_model,
            base_model=base_model,
            base_revision=base_revision,
            template_hash=template_hash,
            system_prompt=system_prompt,
            sampling=sampling or {},
            created_by=created_by,
        )
    )
    session.flush()
    set_aliases(session, name, aliases)
    return deployment


def get_deployment(session: Session, name: str) -> Deployment:
    """The deployment of that name (aliases don't count); raises `NotFound`."""
    deployment = session.get(Deployment, name)
    if deployment is None:
        raise NotFound(f"No deployment {name!r}; the list of deployments names those that exist.")
    return deployment


def find_deployment_by_model(session: Session, model: str) -> Deployment | None:
    """The deployment that `model` names, by its own name or an alias; None otherwise."""
    alias = session.get(DeploymentAlias, model)
    return session.get(Deployment, alias.deployment if alias else model)


def list_deployments(session: Session, *, names: Collection[str] | None = None) -> list[Deployment]:
    """Deployments by name; only those in `names` unless it is None."""
    query = select(Deployment).order_by(Deployment.name)
    if names is not None:
        query = query.where(Deployment.name.in_(names))
    return list(session.scalars(query))


def list_aliases(session: Session, deployment: str) -> list[str]:
    """The other names of a deployment, sorted."""
    return list(
        session.scalars(
            select(DeploymentAlias.alias)
            .where(DeploymentAlias.deployment == deployment)
            .order_by(DeploymentAlias.alias)
        )
    )


def set_aliases(session: Session, deployment: str, aliases: Sequence[str]) -> None:
    """Replace all aliases of a deployment.

    Raises `BadRequest`, or `Conflict` for one that is taken.
    """
    row = get_deployment(session, deployment)
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise BadRequest(
                f"{alias!r} can't be an alias: use 1 to 128 letters, digits, '.', '_', ':', '/' "
                "and '-', beginning with a letter or digit.",
                param="aliases",
            )
    session.execute(delete(DeploymentAlias).where(DeploymentAlias.deployment == deployment))
    for alias in dict.fromkeys(aliases):
        _refuse_taken(session, alias, base_model=row.base_model, param="aliases")
        try:
            with session.begin_nested():
                session.add(DeploymentAlias(alias=alias, deployment=deployment))
                session.flush()
        except IntegrityError:
            raise _taken(alias, "an alias", "aliases") from None


def _refuse_taken(session: Session, name: str, *, base_model: str, param: str) -> None:
    bases = select(Deployment.name).where(Deployment.base_model == name).limit(1)
    if name == base_model or session.scalar(bases) is not None:
        raise _taken(name, "the name of a base model", param)
    if session.get(Deployment, name) is not None:
        raise _taken(name, "a deployment", param)
    if session.get(DeploymentAlias, name) is not None:
        raise _taken(name, "an alias", param)


def _taken(name: str, by: str, param: str) -> Conflict:
    return Conflict(
        f"{name!r} is already {by}; choose another name.", param=param, code="name_taken"
    )
