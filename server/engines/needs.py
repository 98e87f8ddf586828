"""Which adapters have to stay on the engines: of roles, on their way to one, under evaluation.

Owns: the roles as the directory last said them, the moves that are under way, and the evaluation
slot, which one release at a time holds for as long as its worker renews it. Does not own: what
requests keep loaded (`chooser.py`), or how anything gets onto an engine (`loading.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from feedback.errors import Conflict, NotReady
from server.engines.picture import Roles, Weights


@dataclass(frozen=True, slots=True)
class EvaluationSlot:
    """The adapter slot for evaluations, while a worker has it for one release."""

    token: str
    release: Weights
    expires_at: float  #: of the conductor's monotonic clock


class Needs:
    """What must not be unloaded whatever requests do."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.roles = Roles()
        self._monotonic = monotonic
        self._moving: dict[str, int] = {}  #: engine names on their way to a role, how often
        self._slots: dict[str, EvaluationSlot] = {}  #: by token; all are of one release

    @contextmanager
    def keep(self, release: Weights) -> Iterator[None]:
        """Need `release` for the time of the block: it is on its way to a role."""
        name = release.engine_name
        self._moving[name] = self._moving.get(name, 0) + 1
        try:
            yield
        finally:
            self._moving[name] -= 1
            if not self._moving[name]:
                del self._moving[name]

    def moving(self) -> frozenset[str]:
        """Engine names of what is on its way to a role."""
        return frozenset(self._moving)

    def under_evaluation(self) -> frozenset[str]:
        """Engine names in the evaluation slot."""
        self._drop_expired()
        return frozenset(slot.release.engine_name for slot in self._slots.values())

    def all(self) -> set[str]:
        """Engine names of everything that is needed."""
        wanted = {release.engine_name for release in self.roles.wanted}
        return wanted | self._moving.keys() | self.under_evaluation()

    # The evaluation slot

    def take_slot(self, release: Weights, token: str) -> None:
        """Have the slot for `release` until it is given back or, once renewed, expires.

        Raises NotReady when another release is under evaluation.
        """
        self._drop_expired()
        other = next(
            (s for s in self._slots.values() if s.release.engine_name != release.engine_name), None
        )
        if other is not None:
            raise NotReady(
                f"release {other.release.name!r} is under evaluation; "
                "the slot is free again when that ends",
                code="evaluation_slot_taken",
            )
        self._slots[token] = EvaluationSlot(token, release, math.inf)

    def renew_slot(self, token: str, seconds: float) -> EvaluationSlot:
        """Keep the slot for another `seconds`. Raises Conflict when it was lost."""
        self._drop_expired()
        slot = self._slots.get(token)
        if slot is None:
            raise Conflict(
                "this hold of the evaluation slot has ended; ask for a new one", code="slot_ended"
            )
        self._slots[token] = EvaluationSlot(token, slot.release, self._monotonic() + seconds)
        return self._slots[token]

    def give_slot_back(self, token: str) -> None:
        """End an evaluation's time in the slot; unknown ones have ended already."""
        self._slots.pop(token, None)

    def _drop_expired(self) -> None:
        present = self._monotonic()
        for token in [token for token, slot in self._slots.items() if slot.expires_at <= present]:
            del self._slots[token]
