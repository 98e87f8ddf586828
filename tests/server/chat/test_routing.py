"""Which release answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.answers import EarlierAnswer
from feedback.errors import NotFound
from feedback.tables import Arm
from server.chat.routing import (
    MOST_NAMED,
    DeploymentView,
    ReleaseView,
    Snapshot,
    canary_draw,
    list_names,
    route,
    unknown_model,
)


def release(number: int, deployment: str = "assistant") -> ReleaseView:
    return ReleaseView(
        name=f"{deployment}@{number}",
        deployment=deployment,
        number=number,
        engine_name=f"{deployment}-{number}-abcd",
        adapter_id=f"ad_{number}",
        adapter_hash=f"{number}" * 64,
        base_revision="r",
        template_hash="t",
        system_prompt=None,
        sampling={},
        state="candidate",
    )


ASSISTANT = DeploymentView(
    name="assistant",
    base_model="tiny",
    generation=3,
    production=release(2),
    previous=release(1),
    canary=release(3),
    canary_percent=10.0,
    canary_id="canary-1",
)
PLAIN = replace(ASSISTANT, canary=None, canary_percent=0.0, canary_id=None)
WRITER = DeploymentView("writer", "tiny", 0, release(0, "writer"))


def snapshot(assistant: DeploymentView = PLAIN) -> Snapshot:
    return Snapshot(
        base_model="tiny",
        deployments={"assistant": assistant, "writer": WRITER},
        aliases={"gpt-4o-mini": "assistant", "gone": "nobody"},
        served={"assistant@9": release(9)},
    )


def earlier(number: int, deployment: str = "assistant") -> EarlierAnswer:
    return EarlierAnswer("chatcmpl-1", "conv_1", deployment, f"{deployment}@{number}")


@pytest.mark.parametrize(
    ("model", "allowed", "public_name", "arm"),
    [
        ("assistant", None, "assistant@2", Arm.PRODUCTION),
        ("assistant", ("assistant",), "assistant@2", Arm.PRODUCTION),
        ("gpt-4o-mini", ("assistant",), "assistant@2", Arm.PRODUCTION),
        ("assistant@1", None, "assistant@1", Arm.PINNED),
        ("assistant@2", None, "assistant@2", Arm.PINNED),
        ("assistant@9", ("assistant",), "assistant@9", Arm.PINNED),
        ("tiny", None, "tiny", Arm.BASE),
        ("tiny", ("writer",), "tiny", Arm.BASE),
    ],
)
def test_a_name_leads_to_its_release(
    model: str, allowed: tuple[str, ...] | None, public_name: str, arm: Arm
) -> None:
    found = route(snapshot(), model, person_id="p", allowed=allowed)
    assert (found.public_name, found.arm) == (public_name, arm)


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        ("nobody", None),
        ("gone", None),
        ("", None),
        ("Assistant", None),
        ("../../x", None),
        ("/etc/passwd", None),
        ("assistant@7", None),
        ("assistant@", None),
        ("assistant@2@2", None),
        ("assistant-2-abcd", None),
        ("assistant", ("writer",)),
        ("gpt-4o-mini", ("writer",)),
        ("assistant@2", ("writer",)),
        ("assistant@9", ("writer",)),
        ("tiny", ()),
    ],
)
def test_an_unknown_name_and_one_of_somebody_else_are_the_same_404(
    model: str, allowed: tuple[str, ...] | None
) -> None:
    with pytest.raises(NotFound) as refused:
        route(snapshot(), model, person_id="p", allowed=allowed)
    assert refused.value.code == "model_not_found"
    assert ("assistant" in refused.value.message.partition("your models:")[2]) == (allowed is None)


def test_a_release_read_from_the_database_answers_unless_its_deployment_is_not_known_yet() -> None:
    found = route(snapshot(), "assistant@7", person_id="p", allowed=None, pinned=release(7))
    assert found.engine_name == "assistant-7-abcd"
    with pytest.raises(NotFound):
        route(snapshot(), "new@1", person_id="p", allowed=None, pinned=release(1, "new"))


@pytest.mark.parametrize(
    ("view", "said_by", "public_name"),
    [
        (PLAIN, 1, "assistant@1"),  # promoted over: keeps its conversations
        (replace(PLAIN, rolled_back=True), 1, "assistant@2"),  # rolled back: loses them
        (PLAIN, 0, "assistant@2"),  # no role any more
        (PLAIN, 2, "assistant@2"),
        (ASSISTANT, 3, "assistant@3"),
        (PLAIN, 3, "assistant@2"),  # the canary is void
    ],
)
def test_a_conversation_keeps_its_release_while_that_has_a_role(
    view: DeploymentView, said_by: int, public_name: str
) -> None:
    person = next(f"p{i}" for i in range(100) if canary_draw("canary-1", f"p{i}") > 10)
    found = route(
        snapshot(view), "assistant", person_id=person, allowed=None, earlier=earlier(said_by)
    )
    assert found.public_name == public_name


def test_a_conversation_with_another_deployment_keeps_nothing() -> None:
    found = route(
        snapshot(), "assistant", person_id="p", allowed=None, earlier=earlier(0, "writer")
    )
    assert found.public_name == "assistant@2"


@given(st.text(min_size=1), st.floats(0, 100))
def test_a_person_stays_on_one_side_of_a_canary_and_only_ever_moves_towards_it(
    person: str, percent: float
) -> None:
    def arm(share: float) -> Arm:
        view = replace(ASSISTANT, canary_percent=share)
        return route(snapshot(view), "assistant", person_id=person, allowed=None).arm

    assert arm(percent) == arm(percent)
    assert arm(0) is Arm.PRODUCTION
    assert arm(100) is Arm.CANARY
    if arm(percent) is Arm.CANARY:
        assert arm(min(100.0, percent + 1)) is Arm.CANARY


def test_a_canary_s_share_is_that_of_the_people_and_recorded() -> None:
    routes = [
        route(snapshot(ASSISTANT), "assistant", person_id=f"p{i}", allowed=None)
        for i in range(2000)
    ]
    canaries = [found for found in routes if found.arm is Arm.CANARY]
    assert 0.08 < len(canaries) / len(routes) < 0.12
    assert {found.propensity for found in canaries} == {0.1}
    assert {found.propensity for found in routes if found.arm is Arm.PRODUCTION} == {0.9}


def test_the_error_for_an_unknown_model_lists_a_few_names_however_many_there_are() -> None:
    many = {
        f"d{n:05}": replace(WRITER, name=f"d{n:05}", production=release(0, f"d{n:05}"))
        for n in range(10_000)
    }
    crowded = Snapshot(base_model="tiny", deployments=many)
    for allowed, more in ((None, 10_001), (tuple(many)[:30], 31), (("d00001",), 2), ((), 0)):
        message = unknown_model("x", crowded, allowed).message
        listed = list_names(crowded, allowed)[:MOST_NAMED]
        assert f"your models: {', '.join(listed) or 'none'}" in message
        left = f"and {more - MOST_NAMED} more"
        assert (left in message) == (more > MOST_NAMED)
        assert len(message) < 500


def test_a_refusal_goes_through_the_names_once_for_each_snapshot() -> None:
    class Counted(dict[str, DeploymentView]):
        scans = 0

        def __iter__(self) -> Iterator[str]:
            self.scans += 1
            return super().__iter__()

    names = Counted(assistant=PLAIN, writer=WRITER)
    crowded = Snapshot(base_model="tiny", deployments=names)
    for model in ("x", "x@1", "nobody@2", "assistant@99", "tiny"):
        for allowed in (None, ("writer",)):
            if model != "tiny":
                with pytest.raises(NotFound):
                    route(crowded, model, person_id="p", allowed=allowed)
            else:
                route(crowded, model, person_id="p", allowed=allowed)
    assert names.scans == 2  # one for each kind of key
