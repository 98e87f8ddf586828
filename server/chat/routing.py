"""Which release answers a request.

Owns: the gateway's view of deployments (`Snapshot`) and the pure rule `route`. Does not own:
reading a snapshot from the database (`directory.py`), or which engine has the adapter
(`engines/chooser.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from feedback.answers import EarlierAnswer
from feedback.errors import NotFound
from feedback.tables import Arm

MOST_NAMED = 20  #: models that the error for an unknown one lists


@dataclass(frozen=True, slots=True)
class ReleaseView:
    """A release as routing needs it."""

    name: str
    deployment: str
    number: int
    engine_name: str
    adapter_id: str | None
    adapter_hash: str | None
    base_revision: str
    template_hash: str | None
    system_prompt: str | None
    sampling: Mapping[str, Any]
    state: str
    acceptance: Mapping[str, Any] | None = None
    """A person accepted that the noise of such engines hides its effect."""


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A deployment's row, its roles resolved to releases."""

    name: str
    base_model: str
    generation: int
    production: ReleaseView
    previous: ReleaseView | None = None
    canary: ReleaseView | None = None
    canary_percent: float = 0.0
    canary_id: str | None = None
    prepend: bool = False
    template_kwargs: frozenset[str] = frozenset({"enable_thinking", "thinking"})
    rolled_back: bool = False  #: `previous` was rolled back from: no conversation keeps it

    def roles(self) -> list[ReleaseView]:
        """The releases that must stay loaded, production first."""
        return [r for r in (self.production, self.previous, self.canary) if r is not None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All deployments at one moment.

    Replaced as a whole, so a request never sees half a promotion.
    """

    base_model: str
    deployments: Mapping[str, DeploymentView] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    served: Mapping[str, ReleaseView] = field(default_factory=dict)
    """Releases that some engine holds beyond the roles: under evaluation, or pinned by a caller."""
    roles: tuple[ReleaseView, ...] = field(init=False)  #: of all deployments
    _listed: dict[tuple[str, ...] | None, str] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        roles = tuple(r for deployment in self.deployments.values() for r in deployment.roles())
        object.__setattr__(self, "roles", roles)

    def find_release(self, name: str) -> ReleaseView | None:
        """The release of that name, where memory knows it."""
        deployment = self.deployments.get(name.partition("@")[0])
        if deployment is not None:
            for release in deployment.roles():
                if release.name == name:
                    return release
        return self.served.get(name)

    def may_use_base(self, allowed: tuple[str, ...] | None) -> bool:
        """Whether a key with these deployments (None: all) may name the base model."""
        return allowed is None or any(name in self.deployments for name in allowed)

    def describe_names(self, allowed: tuple[str, ...] | None) -> str:
        """The models of such a key for an error's message, made once for each snapshot."""
        listed = self._listed.get(allowed)
        if listed is None:
            names = list_names(self, allowed)
            more = len(names) - MOST_NAMED
            listed = ", ".join(names[:MOST_NAMED]) or "none"
            listed += f" and {more} more (GET /v1/models lists them)" if more > 0 else ""
            self._listed[allowed] = listed
        return listed


@dataclass(frozen=True, slots=True)
class Route:
    """Who answers: resolved once, held for the whole request."""

    deployment: DeploymentView | None  #: None: the base model by its own name
    release: ReleaseView | None  #: None with `deployment` None
    public_name: str  #: what the reply's `model` says
    engine_name: str
    arm: Arm
    propensity: float = 1.0


def unknown_model(model: str, snapshot: Snapshot, allowed: tuple[str, ...] | None) -> NotFound:
    """The error for a model that is not there or not this key's; it lists what is."""
    return NotFound(
        f"the model {model[:200]!r} does not exist or is not yours; "
        f"your models: {snapshot.describe_names(allowed)}",
        param="model",
        code="model_not_found",
    )


def list_names(snapshot: Snapshot, allowed: tuple[str, ...] | None) -> list[str]:
    """Deployments and the base that a key may use, sorted."""
    names = [name for name in snapshot.deployments if allowed is None or name in allowed]
    bases = {snapshot.base_model} if snapshot.may_use_base(allowed) else set()
    return sorted({*names, *bases})


def check_model(snapshot: Snapshot, model: str, allowed: tuple[str, ...] | None) -> None:
    """Check in memory that `model` names a deployment or the base, and that the key may use it.

    Raises NotFound otherwise. Whether a release of that deployment exists is not known here.
    """
    name, at, _ = model.partition("@")
    name = name if at else snapshot.aliases.get(model, model)
    if name in snapshot.deployments:
        if allowed is None or name in allowed:
            return
    elif not at and name == snapshot.base_model and snapshot.may_use_base(allowed):
        return
    raise unknown_model(model, snapshot, allowed)


def canary_draw(canary_id: str, person_id: str) -> float:
    """A person's fixed place in [0, 100) for one canary."""
    digest = hashlib.sha256(f"{canary_id}/{person_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 * 100


def route(
    snapshot: Snapshot,
    model: str,
    *,
    person_id: str,
    allowed: tuple[str, ...] | None,
    earlier: EarlierAnswer | None = None,
    pinned: ReleaseView | None = None,
) -> Route:
    """The release that answers `model` for this person. Pure.

    `allowed` is the key's list of deployments (None: all). `earlier` is the answer that the request
    continues: its release is kept while the deployment still holds it in a role. `pinned` is a
    release that memory does not know, read from the database by the caller. Raises NotFound, naming
    the caller's models.
    """
    check_model(snapshot, model, allowed)
    if "@" in model:
        release = snapshot.find_release(model) or pinned
        if release is None or release.name != model:
            raise unknown_model(model, snapshot, allowed)
        owner = snapshot.deployments[release.deployment]
        return Route(owner, release, release.name, release.engine_name, Arm.PINNED)
    name = snapshot.aliases.get(model, model)
    deployment = snapshot.deployments.get(name)
    if deployment is None:
        return Route(None, None, name, name, Arm.BASE)
    share = deployment.canary_percent / 100 if deployment.canary is not None else 0.0
    kept = _kept(deployment, earlier)
    if kept is not None:
        arm = Arm.CANARY if kept is deployment.canary else Arm.PRODUCTION
        return Route(deployment, kept, kept.name, kept.engine_name, arm)
    if (
        deployment.canary is not None
        and deployment.canary_id is not None
        and canary_draw(deployment.canary_id, person_id) < deployment.canary_percent
    ):
        chosen = deployment.canary
        return Route(deployment, chosen, chosen.name, chosen.engine_name, Arm.CANARY, share)
    chosen = deployment.production
    return Route(deployment, chosen, chosen.name, chosen.engine_name, Arm.PRODUCTION, 1.0 - share)


def _kept(deployment: DeploymentView, earlier: EarlierAnswer | None) -> ReleaseView | None:
    """The release of the conversation so far, while it holds a role.

    One that was promoted over is `previous` and keeps its conversations; one that was rolled back
    is `previous` too and loses them.
    """
    if earlier is None or earlier.deployment != deployment.name:
        return None
    for release in deployment.roles():
        if release.name == earlier.release and not (
            release is deployment.previous and deployment.rolled_back
        ):
            return release
    return None
