"""Deployments are made, and set otherwise.

Owns: what a base must take before it serves a deployment, the room that one needs on an engine, and
which changes act at once and which make a candidate. Does not own: the rows (`tuner/`),
moves of releases (`promotion.py`). Functions take the session first and never commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback.errors import BadRequest, Conflict, Forbidden
from server.access.keyring import Caller
from server.access.visibility import append_audit, sees
from server.gateway import Gateway
from tuner import deployments, releases
from tuner.base_models import BaseModel
from tuner.policies import merge_policies
from tuner.tables import Adapter, Deployment, Release


def create_deployment(
    session: Session,
    gateway: Gateway,
    caller: Caller,
    *,
    name: str,
    base_model: str | None,
    system_prompt: str | None,
    sampling: dict[str, Any],
    aliases: Sequence[str],
    policies: Mapping[str, Any],
) -> Deployment:
    """Make a public name; without a `base_model` it is what the engines serve.

    Raises Forbidden, BadRequest, or Conflict: `no_adapter_slot` where the engines have no room.
    """
    if not sees(caller, name):
        raise Forbidden(
            f"this key is limited to {', '.join(caller.key.deployments or ()) or 'no deployment'}"
        )
    base = gateway.base
    _check_base_serves(gateway, base_model or base.name)
    _check_prompt(base, system_prompt)
    row = deployments.create_deployment(
        session,
        name=name,
        base_model=base.name,
        base_revision=base.revision,
        template_hash=base.template_hash,
        system_prompt=system_prompt,
        sampling=sampling,
        aliases=aliases,
        policies=merge_policies({}, policies),
        created_by=caller.key.user,
    )
    count = session.scalar(select(func.count()).select_from(Deployment)) or 0
    capacity = gateway.chooser.picture.capacity
    if count > (capacity - 1) // 3:
        raise Conflict(
            f"{count - 1} deployments are there, and an engine holds {capacity} "
            f"adapters: another one takes engine.max_loras of at least {3 * count + 1} "
            "(three for each and one more)",
            code="no_adapter_slot",
        )
    append_audit(session, caller, "deployment_created", row.name, aliases=aliases)
    return row


def change_deployment(
    session: Session, base: BaseModel, caller: Caller, row: Deployment, given: Mapping[str, Any]
) -> Release | None:
    """Set what is `given`; return the candidate that a new system prompt or new sampling makes.

    Null aliases and policies stay as they are. Raises BadRequest, or Conflict for a taken alias.
    """
    if given.get("aliases") is not None:
        deployments.set_aliases(session, row.name, given["aliases"])
    if given.get("policies") is not None:
        row.policies = merge_policies(row.policies, given["policies"])
    production = releases.production_of(session, row)
    prompt = given.get("system_prompt", production.system_prompt)
    sampling = (given["sampling"] or {}) if "sampling" in given else production.sampling
    if "system_prompt" in given:
        _check_prompt(base, prompt)
    candidate = None
    if (prompt, sampling) != (production.system_prompt, production.sampling):
        # It learned what production learned, so it carries where that comes from.
        candidate = releases.create_release(
            session,
            row,
            adapter=session.get(Adapter, production.adapter_id) if production.adapter_id else None,
            system_prompt=prompt,
            sampling=sampling,
            job_id=production.job_id,
            suffix=production.suffix,
            dataset_id=production.dataset_id,
            sources_left_out=production.sources_left_out,
            created_by=caller.key.user,
        )
    session.flush()
    append_audit(
        session,
        caller,
        "deployment_changed",
        row.name,
        changed=sorted(given),
        candidate=None if candidate is None else candidate.name,
    )
    return candidate


def _check_base_serves(gateway: Gateway, base_model: str) -> None:
    """Raise `BadRequest` unless the engines serve `base_model`."""
    if base_model != gateway.base.name:
        raise BadRequest(
            f"the engines serve {gateway.base.name!r}, not {base_model!r}; "
            "start another Burnish for it",
            param="base_model",
        )


def _check_prompt(base: BaseModel, prompt: str | None) -> None:
    """Raise `BadRequest` where the base's chat template takes no such system prompt."""
    if not prompt:
        return
    (message,) = base.control_tokens.defuse([{"role": "system", "content": prompt}])
    why = base.chat_template.refuses_system(message["content"])
    if why is not None:
        raise BadRequest(
            f"the chat template of {base.name!r} takes no system prompt: {why[:200]}; leave it "
            "out, and let callers say it in their first message",
            param="system_prompt",
        )
