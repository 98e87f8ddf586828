"""Releases that requests name themselves: loaded for them where a slot is left.

Owns: whether there is room for one more, and what an engine refused a moment ago. Does not own: how
a release is loaded (`conductor.py`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from feedback.errors import NotReady
from server.engines.chooser import Chooser, Hold
from server.engines.loading import Unfit
from server.engines.picture import Weights

REFUSED_SECONDS = 15.0  #: in which a release that proved unfit is not loaded for a pin again
MOST_REFUSED = 256  #: releases that are remembered as unfit


class Pins:
    """Pins use the slots that roles and evaluation leave.

    `prepare` has the conductor load and prove a release.
    """

    def __init__(
        self,
        chooser: Chooser,
        prepare: Callable[..., Awaitable[Any]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chooser = chooser
        self._prepare = prepare
        self._monotonic = monotonic
        self._refused: dict[str, tuple[float, Unfit]] = {}  #: by engine name, until when

    async def pin(self, release: Weights, hold: Hold, *, tolerate_noise: bool = False) -> None:
        """Have `release` loaded and proven for a request that names it, until `hold` ends.

        Raises NotReady `no_adapter_slot` where no slot is left, and what `Conductor.prepare`
        raises; Unfit at once where it was raised a moment ago.
        """
        self._check_room(release)
        hold.take(release)
        if self._chooser.picture.serves(release, tolerate_noise=tolerate_noise):
            return
        until, known = self._refused.get(release.engine_name, (0.0, None))
        if known is not None and self._monotonic() < until:
            raise Unfit(known.message, code=str(known.code), proof=known.proof)
        try:
            await self._prepare(release, tolerate_noise=tolerate_noise)
        except Unfit as error:
            self._remember_refusal(release.engine_name, error)
            raise

    def _check_room(self, release: Weights) -> None:
        """The evaluation slot is no pin's, and no pin takes the place of what has a role."""
        picture = self._chooser.picture
        in_roles, name = picture.in_roles(), release.engine_name
        if release.adapter_id is None or name in in_roles | picture.under_evaluation:
            return
        in_use = (in_roles | self._chooser.held() | {name}) - {picture.base_name}
        slots = picture.smallest_slots()
        if len(in_use) > slots - 1:
            raise NotReady(
                f"release {release.name!r} finds no slot: roles and running requests need "
                f"{len(in_use) - 1} of {slots} and one is for evaluations; try again, "
                "or raise engine.max_loras",
                code="no_adapter_slot",
            )

    def _remember_refusal(self, engine_name: str, error: Unfit) -> None:
        self._refused.pop(engine_name, None)
        self._refused[engine_name] = (self._monotonic() + REFUSED_SECONDS, error)
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]
