"""`/admin/deployments`: public model names, what they are set to, and the moves of their releases.

A change is in force on this gateway before its reply is sent. A new system prompt or new sampling
changes no answer: it makes a candidate, which is evaluated and promoted like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from pydantic import Field, model_validator
from sqlalchemy.orm import Session

from feedback.errors import BadRequest
from server.access.keyring import Caller
from server.access.visibility import get_deployment, get_release
from server.chat.request import Bounded
from server.deployments import changes, promotion
from server.deployments.promotion import Move
from server.endpoints.bodies import Body, JsonRoute, Part
from server.endpoints.dependencies import CallerDep, GatewayDep, ReadSession
from server.endpoints.fields import Generation, Name, Note
from server.engines.picture import Picture
from server.gateway import Gateway
from server.views.deployments import (
    ChangedDeployment,
    DeploymentObject,
    view_deployment,
)
from server.views.objects import Page, page
from tuner import deployments

router = APIRouter(prefix="/admin/deployments", tags=["deployments"], route_class=JsonRoute)

Prompt = Annotated[str, Field(max_length=64_000)]
Aliases = Annotated[list[str], Field(max_length=64)]


class SamplingDefaults(Part):
    """What requests that say nothing are sampled with; bounds as in a chat request."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Bounded | None = None
    frequency_penalty: Bounded | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Policies(Part):
    """What may be set: a field left out keeps its value, null returns to the default."""

    curation: dict[str, Any] | None = Field(
        default=None, description="Choices between a verdict and a training example."
    )
    system_prompt: Literal["prepend", "replace"] | None = Field(
        default=None,
        description="`prepend`: ours stands before a caller's own; `replace`: a caller's own wins.",
    )
    template_kwargs: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=32)]
        | None
    ) = Field(default=None, description="Keys of `chat_template_kwargs` that callers may set.")

    def given(self) -> dict[str, Any]:
        """What was sent, null too."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class DeploymentCreate(Body):
    """A new public name, answered by the base without adapter."""

    name: str
    base_model: str | None = Field(default=None, description="Default: what the engines serve.")
    system_prompt: Prompt | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    aliases: Aliases = []
    policies: Policies = Policies()


class DeploymentChange(Body):
    """What is left out stays as it is."""

    system_prompt: Prompt | None = None
    sampling: SamplingDefaults | None = None
    aliases: Aliases | None = None
    policies: Policies | None = None

    def given(self) -> dict[str, Any]:
        """What was sent, null too."""
        shown = {name: getattr(self, name) for name in self.model_fields_set}
        if self.sampling is not None:
            shown["sampling"] = self.sampling.to_json()
        if self.policies is not None:
            shown["policies"] = self.policies.given()
        return shown

    @model_validator(mode="before")
    @classmethod
    def _keeps_its_base(cls, value: Any) -> Any:
        for name in ("base", "base_model"):
            if isinstance(value, dict) and name in value:
                raise BadRequest(
                    f"{name!r} can't be changed: the adapters of a deployment fit its base alone; "
                    "make another deployment",
                    param=name,
                )
        return value


class Promotion(Body):
    release: Name
    expected_generation: Generation | None = None
    note: Note | None = None
    force: bool = Field(
        default=False, description="Promote without, or against, an evaluation; takes a note."
    )


class Rollback(Body):
    expected_generation: Generation | None = None
    note: Note | None = None


async def picture_of(gateway: GatewayDep) -> Picture:
    """All engines as they are now."""
    return gateway.chooser.picture


PictureDep = Annotated[Picture, Depends(picture_of)]


@router.get("")
def list_deployments(
    caller: CallerDep, session: ReadSession, picture: PictureDep
) -> Page[DeploymentObject]:
    """All deployments, by name."""
    rows = deployments.list_deployments(session, names=caller.key.deployments)
    return page([view_deployment(session, caller, row, picture) for row in rows], False)


@router.get("/{name}")
def get_one_deployment(
    name: str, caller: CallerDep, session: ReadSession, picture: PictureDep
) -> DeploymentObject:
    """One deployment: its roles, its settings, and what its engines hold."""
    return view_deployment(session, caller, get_deployment(session, caller, name), picture)


@router.post("", status_code=201)
async def create_deployment(
    body: DeploymentCreate, caller: CallerDep, gateway: GatewayDep
) -> DeploymentObject:
    """Make a deployment."""

    def make(session: Session) -> str:
        row = changes.create_deployment(
            session,
            gateway,
            caller,
            name=body.name,
            base_model=body.base_model,
            system_prompt=body.system_prompt,
            sampling=body.sampling.to_json(),
            aliases=body.aliases,
            policies=body.policies.given(),
        )
        return row.name

    return await _change(gateway, caller, make)


@router.patch("/{name}")
async def change_deployment(
    name: str, body: DeploymentChange, caller: CallerDep, gateway: GatewayDep
) -> ChangedDeployment:
    """Aliases and policies act at once; system prompt and sampling make the `candidate`."""
    candidate: str | None = None

    def change(session: Session) -> str:
        nonlocal candidate
        row = get_deployment(session, caller, name)
        made = changes.change_deployment(session, gateway.base, caller, row, body.given())
        candidate = None if made is None else made.name
        return name

    changed = await _change(gateway, caller, change)
    return {**changed, "candidate": candidate}


@router.post("/{name}/promote")
async def promote(
    name: str, body: Promotion, caller: CallerDep, gateway: GatewayDep
) -> DeploymentObject:
    """Make a release production. The reply comes after the flip; the previous one stays loaded."""

    def look(session: Session) -> None:
        get_deployment(session, caller, name)
        get_release(session, caller, body.release, param="release")

    await asyncio.to_thread(_read, gateway, look)
    move = _move(caller, body.note, body.expected_generation, force=body.force)
    await promotion.promote(gateway, name, body.release, move)
    return await _show(gateway, caller, name)


@router.post("/{name}/rollback")
async def rollback(
    name: str, caller: CallerDep, gateway: GatewayDep, body: Rollback | None = None
) -> DeploymentObject:
    """Return to the release before. Nothing is loaded: it has stayed."""
    body = body or Rollback()
    await asyncio.to_thread(_read, gateway, lambda session: get_deployment(session, caller, name))
    await promotion.rollback(gateway, name, _move(caller, body.note, body.expected_generation))
    return await _show(gateway, caller, name)


def _move(
    caller: Caller, note: str | None, expected_generation: int | None, *, force: bool = False
) -> Move:
    return Move(
        actor=caller.key.user,
        key_id=caller.key.id,
        note=note,
        force=force,
        expected_generation=expected_generation,
    )


async def _change(
    gateway: Gateway, caller: Caller, work: Callable[[Session], str]
) -> DeploymentObject:
    """Run `work` as one transaction, have the gateway read it, and show the deployment it names."""

    def write() -> str:
        with gateway.database.write() as session:
            return work(session)

    name = await asyncio.to_thread(write)
    await gateway.directory.refresh()
    return await _show(gateway, caller, name)


async def _show(gateway: Gateway, caller: Caller, name: str) -> DeploymentObject:
    picture = gateway.chooser.picture

    def show(session: Session) -> DeploymentObject:
        return view_deployment(session, caller, get_deployment(session, caller, name), picture)

    return await asyncio.to_thread(_read, gateway, show)


def _read(gateway: Gateway, look: Callable[[Session], Any]) -> Any:
    with gateway.database.read() as session:
        return look(session)
