"""The second stage of curation: who counts how much, and which side an example is on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.curation.examples import Claim, DropReason, Feature, Side
from feedback.curation.policy import Policy
from feedback.curation.select import Selection, Standing, find_side, select

ALL_TRAIN = Policy(holdout_share=0.0)
unhurried = settings(deadline=None)  # a busy machine is no failure


def build_feature(
    target: int = 0,
    holds: bool = True,
    person: str = "p1",
    minute: int = 0,
    verdict: str | None = None,
    **fields: str,
) -> Feature:
    """A labelled example: `person` says in `minute` that answer `target` is good, or bad."""
    defaults = {
        "example_id": f"ex_{target}_{holds}",
        "kind": "labelled",
        "answer_id": f"a{target}",
        "root_hash": f"root{target}",
        "prompt_hash": f"prompt{target}",
        "near_hash": f"words{target}",
    }
    return Feature(
        **{**defaults, **fields},
        person_id=person,
        judgement_id=verdict or f"fb_{person}_{target}_{minute:02}",
        claims=(Claim(f"t{target}", holds),),
        judged_at=f"2026-03-01T00:{minute:02}:00.000000+00:00",
    )


def ids(selection: Selection) -> list[str]:
    return [chosen.feature.example_id for chosen in selection.chosen]


def reasons(selection: Selection) -> dict[str, DropReason]:
    return {drop.judgement_id: drop.reason for drop in selection.drops}


features = st.lists(
    st.builds(
        build_feature,
        target=st.integers(0, 5),
        holds=st.booleans(),
        person=st.sampled_from(["p1", "p2", "p3", "p4"]),
        minute=st.integers(0, 59),
    ),
    max_size=30,
    unique_by=lambda feature: feature.judgement_id,
)
policies = st.builds(
    Policy,
    person_cap=st.one_of(st.none(), st.integers(1, 4)),
    holdout_share=st.sampled_from([0.0, 0.3, 0.6]),
    salt=st.sampled_from(["one", "two"]),
)


@unhurried
@given(features, policies, st.sampled_from(["p1", "p2"]))
def test_without_a_person_the_set_is_as_if_they_had_never_judged(
    said: list[Feature], policy: Policy, person: str
) -> None:
    excluded = select(said, {person: Standing.EXCLUDED}, policy)
    without = select([one for one in said if one.person_id != person], {}, policy)
    assert excluded.chosen == without.chosen
    assert [drop for drop in excluded.drops if drop.reason != DropReason.EXCLUDED_PERSON] == list(
        without.drops
    )


@unhurried
@given(features, policies, st.randoms(use_true_random=False))
def test_the_order_of_features_counts_for_nothing(
    said: list[Feature], policy: Policy, chance: random.Random
) -> None:
    expected = select(said, {}, policy)
    shuffled = [replace(one, position=number) for number, one in enumerate(said)]
    chance.shuffle(shuffled)
    assert select(shuffled, {}, policy) == expected


@unhurried
@given(features, policies)
def test_every_feature_is_chosen_or_dropped_with_a_reason(
    said: list[Feature], policy: Policy
) -> None:
    selection = select(said, {}, policy)
    accounted = Counter(chosen.feature.judgement_id for chosen in selection.chosen)
    accounted.update(drop.judgement_id for drop in selection.drops)
    assert accounted == Counter(one.judgement_id for one in said)
    assert len(set(ids(selection))) == len(ids(selection))


@unhurried
@given(features, policies)
def test_what_is_chosen_contradicts_nothing_that_is_chosen(
    said: list[Feature], policy: Policy
) -> None:
    chosen = select(said, {}, policy).chosen
    claims = {claim for one in chosen for claim in one.feature.claims}
    assert not {Claim(claim.target, not claim.holds) for claim in claims} & claims


@unhurried
@given(features, policies)
def test_a_conversations_side_hangs_on_nothing_but_its_first_turn(
    said: list[Feature], policy: Policy
) -> None:
    selection = select(said, {}, policy)
    for chosen in selection.chosen:
        assert chosen.side == find_side(chosen.feature.root_hash, policy)
    held = {one.feature.near_hash for one in selection.chosen if one.side == Side.HOLDOUT}
    assert all(
        one.feature.near_hash not in held for one in selection.chosen if one.side == Side.TRAIN
    )


@settings(unhurried, max_examples=15)
@given(st.integers(1, 40), st.integers(0, 400))
def test_one_person_counts_no_more_than_the_cap(cap: int, verdicts: int) -> None:
    said = [build_feature(target) for target in range(verdicts)]
    policy = Policy(person_cap=cap, holdout_share=0.0)
    selection = select(said, {}, policy)
    assert len(selection.chosen) == min(cap, verdicts)
    assert set(reasons(selection).values()) <= {DropReason.PERSON_CAP}


def test_both_examples_of_a_verdict_count_once_against_the_cap() -> None:
    pair = [
        build_feature(n, verdict=f"fb_{n}", example_id=f"ex_{n}_{kind}", kind=kind)
        for n in range(4)
        for kind in ("supervised", "preference")
    ]
    chosen = select(pair, {}, Policy(person_cap=2, holdout_share=0.0)).chosen
    assert len(chosen) == 4
    assert len({one.feature.judgement_id for one in chosen}) == 2


def test_users_of_one_application_count_like_users_of_many() -> None:
    def build(prefix: str) -> list[Feature]:
        return [
            build_feature(target, person=f"{prefix}{user}", minute=target)
            for user in range(40)
            for target in range(user % 7)
        ]

    assert ids(select(build("app/"), {}, ALL_TRAIN)) == ids(select(build("key"), {}, ALL_TRAIN))


def test_the_later_of_ones_own_opposites_stays() -> None:
    selection = select(
        [build_feature(0, True, minute=1), build_feature(0, False, minute=2)], {}, ALL_TRAIN
    )
    assert ids(selection) == ["ex_0_False"]
    assert reasons(selection) == {"fb_p1_0_01": DropReason.SUPERSEDED}


def test_the_majority_of_people_stays_and_a_draw_leaves_nothing() -> None:
    good = [build_feature(0, True, person=f"p{n}", minute=n) for n in range(2)]
    bad = [build_feature(0, False, person=f"q{n}", minute=n) for n in range(2)]
    outvoted = select([*good, bad[0]], {}, ALL_TRAIN)
    assert ids(outvoted) == ["ex_0_True"]
    assert reasons(outvoted)["fb_q0_0_00"] == DropReason.OUTVOTED
    draw = select([*good, *bad], {}, ALL_TRAIN)
    assert ids(draw) == []
    assert set(reasons(draw).values()) == {DropReason.CONTRADICTED}


def test_repeating_oneself_adds_no_vote() -> None:
    loud = [build_feature(0, True, person="p1", minute=n, verdict=f"fb_{n}") for n in range(9)]
    others = [build_feature(0, False, person=f"q{n}") for n in range(2)]
    assert ids(select([*loud, *others], {}, ALL_TRAIN)) == ["ex_0_False"]


def test_what_several_taught_is_credited_to_the_first() -> None:
    selection = select(
        [build_feature(0, person="p2", minute=1), build_feature(0, person="p1", minute=2)],
        {},
        ALL_TRAIN,
    )
    assert [chosen.feature.person_id for chosen in selection.chosen] == ["p2"]
    assert reasons(selection) == {"fb_p1_0_02": DropReason.DUPLICATE}


def test_the_split_has_the_share_that_was_asked_for_and_grows_with_it() -> None:
    roots = [f"root{number}" for number in range(4_000)]

    def held(share: float, salt: str = "s") -> set[str]:
        policy = Policy(holdout_share=share, salt=salt)
        return {root for root in roots if find_side(root, policy) == Side.HOLDOUT}

    assert held(0.0) == set()
    assert abs(len(held(0.15)) / len(roots) - 0.15) < 0.02
    assert held(0.15) < held(0.3)
    assert held(0.15) != held(0.15, salt="t")


def test_a_held_out_prompt_under_another_conversation_leaves_training() -> None:
    policy = Policy(holdout_share=0.5)
    sides = {find_side(f"root{n}", policy): f"root{n}" for n in range(20)}
    held = build_feature(0, root_hash=sides[Side.HOLDOUT], near_hash="same")
    trained = build_feature(1, root_hash=sides[Side.TRAIN], near_hash="same")
    selection = select([held, trained], {}, policy)
    assert [(one.feature, one.side) for one in selection.chosen] == [(held, Side.HOLDOUT)]
    assert reasons(selection) == {trained.judgement_id: DropReason.NEAR_HOLDOUT}
