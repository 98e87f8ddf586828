"""The worker's way to the engines: the evaluation slot, and log-probabilities of given answers."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from feedback.db import new_id
from feedback.errors import Conflict, NotFound, NotReady
from feedback.formats.messages import as_sent
from server.chat.directory import load_release
from server.chat.routing import ReleaseView
from server.endpoints.bodies import Body, Part, WorkerRoute
from server.endpoints.dependencies import CallerDep, GatewayDep
from server.engines.base import Engine, EngineRefused, EngineUnreachable
from server.engines.needs import EvaluationSlot
from server.errors import EngineFault
from server.gateway import Gateway
from tuner.base_models import BaseModel
from tuner.chat_template import (
    PLAIN,
    AnswerRewritten,
    TemplateRefused,
    until_end_of_turn,
    without_end,
)
from tuner.tables import ReleaseState

router = APIRouter(
    prefix="/internal", tags=["internal"], include_in_schema=False, route_class=WorkerRoute
)

SLOT_SECONDS = 60.0


class SlotRequest(Body):
    release: str


class AnswerItem(Part):
    """An answer to score given its prompt."""

    prompt: Annotated[list[dict[str, Any]], Field(min_length=1)]
    completion: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1)]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None


class TextItem(Part):
    """A plain text to score, as it is."""

    text: Annotated[str, Field(min_length=1, max_length=16_384)]


class ScoreRequest(Body):
    model: str
    items: Annotated[list[AnswerItem | TextItem], Field(min_length=1, max_length=64)]


@router.post("/evaluation-slot", status_code=201)
async def hold_slot(body: SlotRequest, _caller: CallerDep, gateway: GatewayDep) -> dict[str, Any]:
    """Load and prove a release for its evaluation."""
    release = await asyncio.to_thread(_find, gateway, body.release)
    if release.state in (ReleaseState.DISCARDED, ReleaseState.FAILED):
        raise Conflict(f"{release.name!r} is {release.state}", code=f"release_{release.state}")
    slot = await gateway.conductor.take_evaluation_slot(release, new_id("slot_"), SLOT_SECONDS)
    gateway.directory.remember(release.name)
    await gateway.directory.refresh()
    return _describe(slot)


@router.post("/evaluation-slot/{token}/beat")
async def keep_slot(token: str, _caller: CallerDep, gateway: GatewayDep) -> dict[str, Any]:
    """Keep the slot for another while."""
    return _describe(gateway.conductor.renew_evaluation_slot(token, SLOT_SECONDS))


@router.delete("/evaluation-slot/{token}")
async def give_slot_back(token: str, _caller: CallerDep, gateway: GatewayDep) -> dict[str, Any]:
    """The evaluation has ended."""
    gateway.conductor.give_evaluation_slot_back(token)
    return {"token": token, "released": True}


@router.post("/score")
async def score(body: ScoreRequest, _caller: CallerDep, gateway: GatewayDep) -> dict[str, Any]:
    """Log-probability of each completion given its prompt, in nats, summed over its tokens.

    Of a plain text all tokens count but the first, which stands for the prompt.
    """
    engine_name = gateway.base.name
    if body.model != gateway.base.name:
        release = gateway.directory.snapshot.find_release(body.model)
        if release is None:
            release = await asyncio.to_thread(_find, gateway, body.model)
        engine_name = release.engine_name
    replica = gateway.chooser.choose(engine_name)
    try:
        with gateway.chooser.run(replica, engine_name):
            prepared = [await _tokenize(replica.engine, gateway.base, item) for item in body.items]
            wanted = [full for full in prepared if isinstance(full, tuple)]
            figures = (
                await replica.engine.prompt_logprobs(engine_name, [ids for _, ids in wanted])
                if wanted
                else []
            )
    except EngineUnreachable as error:
        gateway.chooser.suspect(replica, str(error))
        raise NotReady("the engine went away; try again", code="engine_failed") from None
    except EngineRefused as error:
        if error.status == 404:  # its own words may repeat a text, and the reason is logged
            gateway.chooser.suspect(replica, f"it has forgotten {engine_name!r}")
        raise EngineFault(f"the engine refused: {error.message}", code="engine_refused") from None
    scored = iter(zip(wanted, figures, strict=True))
    items: list[dict[str, Any]] = []
    for found in prepared:
        if isinstance(found, str):
            items.append({"error": found})
            continue
        (prompt_tokens, ids), logprobs = next(scored)
        items.append(
            {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(ids) - prompt_tokens,
                "logprob": sum(logprobs[prompt_tokens - 1 :]),
            }
        )
    return {"items": items}


async def _tokenize(
    engine: Engine, base: BaseModel, item: AnswerItem | TextItem
) -> tuple[int, list[int]] | str:
    if isinstance(item, AnswerItem):
        return await tokenize_item(engine, base, item)
    ids = await engine.tokenize_text(base.name, item.text)
    if len(ids) < 2:
        return "empty"
    return "too_long" if len(ids) >= _longest(engine, base) else (1, ids)


async def tokenize_item(
    engine: Engine, base: BaseModel, item: AnswerItem
) -> tuple[int, list[int]] | str:
    """(prompt length, ids of both up to the completion's end-of-turn token), or why there is none.

    The same tokens as the trainer learns from (`tuner/training/rendering.py`). The prompt is
    rendered by the engine, as when it answers, and the text by the base's template: where the two
    differ nothing is scored.
    """
    prompt = base.control_tokens.defuse(as_sent(item.prompt))
    answer = base.control_tokens.defuse(as_sent(item.completion))[0]
    tools = base.control_tokens.defuse_tools(item.tools or None)
    variables = {**(item.template_kwargs or {}), **PLAIN}
    try:
        asked, answered = base.chat_template.render_answer(
            prompt, answer, tools, variables=variables
        )
        asked_ids = await engine.tokenize(base.name, prompt, tools=tools, variables=variables)
        ids = await engine.tokenize_text(base.name, asked + answered)
        if ids[: len(asked_ids)] == asked_ids:
            answer_ids = ids[len(asked_ids) :]
        elif await engine.tokenize_text(base.name, asked) == asked_ids:
            answer_ids = await engine.tokenize_text(base.name, answered)
        else:
            return "template_mismatch"
    except TemplateRefused:
        return "template_refused"
    except AnswerRewritten:
        return "answer_rewritten"
    except EngineRefused as error:
        if error.status != 400:
            raise
        return "template_refused"
    completion = until_end_of_turn(answer_ids, base.eos_token_ids)
    if len(completion) < 2:
        return "empty"
    if item.completion[0].get("cut_off"):
        completion = without_end(completion)
    if len(asked_ids) + len(completion) >= _longest(engine, base):
        return "too_long"
    return len(asked_ids), [*asked_ids, *completion]


def _longest(engine: Engine, base: BaseModel) -> int:
    """How many tokens the engine reads at most."""
    if engine.max_model_len is None:
        return base.max_position_embeddings
    return min(base.max_position_embeddings, engine.max_model_len)


def _find(gateway: Gateway, name: str) -> ReleaseView:
    with gateway.database.read() as session:
        release = load_release(session, name)
    if release is None:
        raise NotFound(f"no release {name!r}", param="release")
    return release


def _describe(slot: EvaluationSlot) -> dict[str, Any]:
    return {
        "token": slot.token,
        "release": slot.release.name,
        "expires_in_seconds": SLOT_SECONDS,
    }
