"""The second stage of curation: which of all examples are in the set, and on which side.

Each person's part is chosen from that person's verdicts alone, then the parts are united:

1. verdicts of people whom the policy excludes go;
2. where a person said the opposite about the same thing later, the earlier goes (`superseded`);
3. what a person said twice counts once;
4. of more than `person_cap` verdicts of one person, those with the smallest hashes stay: an even
   sample, the same whatever else is in the set;
5. where people disagree, the majority stays; with as many on both sides, nothing does;
6. what several people taught is in the set once, credited to the first;
7. a conversation is on one side, by a hash of its first user turn; training examples that are near
   a held out one go.

Pure, on rows without text, and independent of their order; so taking a person's verdicts away gives
the set that would have been built had they never judged.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from feedback.curation.examples import Drop, DropReason, Feature, Side
from feedback.curation.policy import Policy


class Standing(StrEnum):
    """How a person's verdicts are taken."""

    COUNTED = "counted"  #: up to the policy's cap
    EXCLUDED = "excluded"  #: not at all


@dataclass(frozen=True, slots=True)
class Chosen:
    """An example of the set, on its side."""

    feature: Feature
    side: Side


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen examples, by example id, and the reasons for the others, by judgement."""

    chosen: tuple[Chosen, ...]
    drops: tuple[Drop, ...]


FindNear = Callable[[Sequence[Feature], Sequence[Feature]], Collection[str]]
"""From training and held out features to the ids of training examples that are too near a held out
one.
"""


def find_same_words(train: Sequence[Feature], holdout: Sequence[Feature]) -> Collection[str]:
    """Training examples whose prompt has the words of one that is held out, in their order."""
    held_out = {feature.near_hash for feature in holdout}
    return {feature.example_id for feature in train if feature.near_hash in held_out}


def find_side(root_hash: str, policy: Policy) -> Side:
    """The side of the split, training or holdout, that a conversation belongs to.

    It depends on the first user turn's hash alone, so it is the same in every set with this salt
    and share.
    """
    digest = hashlib.sha256(f"{policy.salt}\n{root_hash}".encode()).digest()
    return Side.HOLDOUT if int.from_bytes(digest[:6]) < policy.holdout_share * 2**48 else Side.TRAIN


def select(
    features: Iterable[Feature],
    people: Mapping[str, Standing],
    policy: Policy,
    *,
    find_near_holdout: FindNear = find_same_words,
) -> Selection:
    """Choose the examples of a data set. Whoever is not in `people` is counted."""
    drops: list[tuple[Feature, DropReason]] = []
    by_person: defaultdict[str, list[Feature]] = defaultdict(list)
    for feature in features:
        if people.get(feature.person_id) == Standing.EXCLUDED:
            drops.append((feature, DropReason.EXCLUDED_PERSON))
        else:
            by_person[feature.person_id].append(feature)

    united: list[Feature] = []
    for own in by_person.values():
        own.sort(key=_by_time)
        own = _leave_out_superseded(own, drops)
        own = _leave_out_duplicates(own, drops)
        united += _leave_out_past_cap(own, policy, drops)
    united.sort(key=_by_time)
    united = _leave_out_disputed(united, drops)
    united = _leave_out_duplicates(united, drops)

    sides: dict[Side, list[Feature]] = {Side.TRAIN: [], Side.HOLDOUT: []}
    for feature in united:
        sides[find_side(feature.root_hash, policy)].append(feature)
    near = find_near_holdout(sides[Side.TRAIN], sides[Side.HOLDOUT])
    drops += [
        (feature, DropReason.NEAR_HOLDOUT)
        for feature in sides[Side.TRAIN]
        if feature.example_id in near
    ]
    chosen = [
        Chosen(feature, side)
        for side, members in sides.items()
        for feature in members
        if side == Side.HOLDOUT or feature.example_id not in near
    ]
    chosen.sort(key=lambda item: item.feature.example_id)
    drops.sort(key=lambda drop: (drop[0].judgement_id, drop[0].example_id))
    return Selection(
        tuple(chosen),
        tuple(
            Drop(feature.answer_id, feature.judgement_id, reason, feature.kind)
            for feature, reason in drops
        ),
    )


_Drops = list[tuple[Feature, DropReason]]


def _by_time(feature: Feature) -> tuple[str, str, str]:
    return feature.judged_at, feature.judgement_id, feature.example_id


def _leave_out_superseded(own: Sequence[Feature], drops: _Drops) -> list[Feature]:
    """`own` in order of time, without examples that claim what the person later denied."""
    latest = {claim.target: claim.holds for feature in own for claim in feature.claims}
    kept = []
    for feature in own:
        if all(latest[claim.target] == claim.holds for claim in feature.claims):
            kept.append(feature)
        else:
            drops.append((feature, DropReason.SUPERSEDED))
    return kept


def _leave_out_duplicates(features: Sequence[Feature], drops: _Drops) -> list[Feature]:
    """The first of each example."""
    kept: dict[str, Feature] = {}
    for feature in features:
        if kept.setdefault(feature.example_id, feature) is not feature:
            drops.append((feature, DropReason.DUPLICATE))
    return list(kept.values())


def _leave_out_past_cap(own: Sequence[Feature], policy: Policy, drops: _Drops) -> list[Feature]:
    """All examples of at most `person_cap` verdicts.

    What decides is what they teach, not when or by whom.
    """
    first_example: dict[str, str] = {}
    for feature in own:
        known = first_example.get(feature.judgement_id, feature.example_id)
        first_example[feature.judgement_id] = min(known, feature.example_id)
    if policy.person_cap is None or len(first_example) <= policy.person_cap:
        return list(own)
    drawn = sorted(
        first_example,
        key=lambda verdict: hashlib.sha256(
            f"{policy.salt}\n{first_example[verdict]}".encode()
        ).digest(),
    )
    staying = set(drawn[: policy.person_cap])
    drops += [
        (feature, DropReason.PERSON_CAP) for feature in own if feature.judgement_id not in staying
    ]
    return [feature for feature in own if feature.judgement_id in staying]


def _leave_out_disputed(united: Sequence[Feature], drops: _Drops) -> list[Feature]:
    """Examples whose every claim has more people for it than against it."""
    said = {(feature.person_id, claim) for feature in united for claim in feature.claims}
    votes = Counter((claim.target, claim.holds) for _, claim in said)
    kept = []
    for feature in united:
        margins = [
            votes[claim.target, claim.holds] - votes[claim.target, not claim.holds]
            for claim in feature.claims
        ]
        worst = min(margins, default=1)
        if worst > 0:
            kept.append(feature)
        else:
            drops.append((feature, DropReason.OUTVOTED if worst < 0 else DropReason.CONTRADICTED))
    return kept
