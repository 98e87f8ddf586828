"""Data sets: from what people said to files that never change."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from feedback import datasets
from feedback.answers import delete_answer
from feedback.comparisons import NewComparison, compare, withdraw_comparison
from feedback.curation import extractions
from feedback.curation.policy import Policy
from feedback.datasets import (
    Frozen,
    create_dataset,
    finish_freeze,
    freeze,
    get_dataset,
    list_dataset_files,
    list_datasets,
    what_became,
)
from feedback.db import Database
from feedback.errors import Conflict, NotFound
from feedback.judgements import NewJudgement, judge, withdraw
from feedback.people import Viewer
from feedback.tables import (
    Answer,
    AnswerKind,
    AnswerStatus,
    Comparison,
    Dataset,
    DatasetRow,
    DatasetStatus,
    Extraction,
    Judgement,
    Person,
)
from server.views.datasets import view_dataset
from tests.feedback.record import ALL_TRAIN, ask, end, make_viewer, turns
from tuner.evaluation.holdout import Holdout, HoldoutFiles
from tuner.training.rows import read_rows as read_for_training

SPLIT = Policy(holdout_share=0.4)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every freeze here takes several pages."""
    monkeypatch.setattr(extractions, "ANSWERS_PER_PAGE", 4)
    monkeypatch.setattr(datasets, "ROWS_PER_WRITE", 3)


def rate(session: Session, viewer: Viewer, answer: str, value: Any, kind: str = "rating") -> str:
    return judge(session, viewer, NewJudgement(kind, value, completion_id=answer))[0].id


def fill(database: Database, order: Callable[[list[Any]], None] = lambda _: None) -> None:
    """A record with something of everything, made in the given order."""

    def said(question: str, value: Any, by: str = "rating", **fields: Any) -> Any:
        def make(session: Session, ana: Viewer, ben: Viewer) -> None:
            rate(session, ana, ask(session, ana, question, **fields), value, by)

        return make

    def pair(question: str, preferred: str, **fields: Any) -> Any:
        def make(session: Session, ana: Viewer, ben: Viewer) -> None:
            names = [ask(session, ana, question, reply, **fields) for reply in ("Yes", "No way")]
            compare(session, ana, NewComparison((names[0], names[1]), preferred))

        return make

    def withdrawn_pair(session: Session, ana: Viewer, ben: Viewer) -> None:
        names = [ask(session, ana, "Withdrawn?", reply) for reply in ("Yes", "No way")]
        comparison, _ = compare(session, ana, NewComparison((names[0], names[1]), "a"))
        withdraw_comparison(session, ana, comparison.id)

    def conversation(session: Session, ana: Viewer, ben: Viewer) -> None:
        answer = session.get_one(Answer, ask(session, ben, "A talk"))
        about = NewJudgement("rating", True, conversation_id=answer.conversation_id)
        judge(session, ben, about)

    def disputed(session: Session, ana: Viewer, ben: Viewer) -> None:
        root = make_viewer(session, "root", sees_all=True)
        answer = ask(session, ana, "Disputed?")
        rate(session, ana, answer, True)
        rate(session, root, answer, False)

    makers = [
        *(said(f"Question {n}?", n % 3 > 0) for n in range(9)),
        *(said(f"Correct {n}?", f"An answer that is wholly new, number {n}", "correction")
          for n in range(4)),
        said("A small edit?", "Water that falls from the clouds.", "correction"),
        said("More?", True, history=turns("Earlier?", "Yes.")),
        said("System?", True, system="Be brief."),
        said("Stars?", 3, "stars"),
        said("Comment?", "Nice", "comment"),
        said("Unfinished?", True, status=None),
        said("Cut?", True, finish_reason="length"),
        said("Broken?", False, status=AnswerStatus.INTERRUPTED),
        said("Not stored?", True, stored=False),
        said("Not to learn?", True, trainable=False),
        said("A title?", True, kind=AnswerKind.TASK),
        *(pair(f"Which {n}?", "ab"[n % 2]) for n in range(4)),
        pair("Both?", "both_bad"),
        pair("Tie?", "tie"),
        withdrawn_pair,
        conversation,
        disputed,
        said("Another model's?", True, deployment="poet"),
        lambda session, ana, ben: ask(session, ana, "Judged by nobody?"),
    ]  # fmt: skip
    order(makers)
    with database.write() as session:
        ana, ben = make_viewer(session, "ana"), make_viewer(session, "ben")
        for make in makers:
            make(session, ana, ben)


def create(database: Database, policy: Policy = SPLIT, deployment: str = "assistant") -> str:
    with database.write() as session:
        return create_dataset(session, deployment, policy, created_by="ana").id


def build(
    database: Database, data: Path, policy: Policy = SPLIT, deployment: str = "assistant"
) -> dict[str, Any]:
    """A ready data set, as the API shows it."""
    dataset_id = create(database, policy, deployment)
    frozen = freeze(database, dataset_id, data=data, check=lambda: None)
    with database.write() as session:
        return view_dataset(session, finish_freeze(session, dataset_id, frozen))


def read_manifest(data: Path, dataset_id: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(
        (data / "datasets" / dataset_id / "manifest.json").read_text()
    )
    return loaded


def count_extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers that are extracted from now on."""
    seen: list[str] = []
    real = extractions.extract

    def extract(answer: Any, policy: Policy) -> Any:
        seen.append(answer.facts.id)
        return real(answer, policy)

    monkeypatch.setattr(extractions, "extract", extract)
    return seen


def test_every_verdict_is_in_a_row_or_dropped_with_a_reason(
    database: Database, tmp_path: Path
) -> None:
    fill(database)
    shown = build(database, tmp_path)
    manifest = read_manifest(tmp_path, shown["id"])
    with database.read() as session:
        rows = session.scalars(
            select(DatasetRow.judgement_id).where(DatasetRow.dataset_id == shown["id"])
        ).all()
        elsewhere = select(Answer.id).where(Answer.deployment != "assistant")
        said = {
            *session.scalars(
                select(Judgement.id).where(
                    Judgement.answer_id.is_(None) | Judgement.answer_id.not_in(elsewhere)
                )
            ),
            *session.scalars(select(Comparison.id)),
        }
    assert {*rows, *(drop["judgement_id"] for drop in manifest["drops"])} == said
    assert Counter(drop["reason"] for drop in manifest["drops"]) == shown["dropped"]
    assert {
        "teaches_nothing",
        "unfinished",
        "truncated",
        "interrupted",
        "not_stored",
        "not_trainable",
        "task",
        "small_edit",
        "withdrawn",
        "whole_conversation",
        "contradicted",
    } == set(shown["dropped"])


def test_files_rows_and_counts_agree(database: Database, tmp_path: Path) -> None:
    fill(database)
    shown = build(database, tmp_path)
    manifest = read_manifest(tmp_path, shown["id"])
    with database.read() as session:
        files = list_dataset_files(session, shown["id"])
        linked = Counter((row.kind, row.side) for row in session.scalars(select(DatasetRow)))
    found: Counter[tuple[str | None, str | None]] = Counter()
    for file in files:
        content = (tmp_path / file.path).read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        assert (len(content), len(lines)) == (file.bytes, file.rows)
        assert hashlib.sha256(content).hexdigest() == file.sha256
        if file.dialect == "trl":
            found[file.kind, file.side] += file.rows
            assert [row["id"] for row in lines] == sorted({row["id"] for row in lines})
    assert found == linked
    train = {kind: count for (kind, side), count in found.items() if side == "train"}
    holdout = sum(count for (_, side), count in found.items() if side == "holdout")
    assert shown["counts"] == {"supervised": 0, "preference": 0, "labelled": 0} | train | {
        "holdout": holdout
    }
    assert holdout > 0
    assert len(train) == 3
    assert {(file["path"], file["sha256"]) for file in manifest["files"]} == {
        (Path(file.path).name, file.sha256) for file in files
    }
    names = {path.name for path in (tmp_path / "datasets" / shown["id"]).iterdir()}
    assert names == {"manifest.json", *(file["path"] for file in manifest["files"])}


def test_it_is_shown_as_the_api_promises(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        rate(session, ana, ask(session, ana), "Drops that a cloud lets go", "correction")
    waiting = create(database, ALL_TRAIN)
    with database.read() as session:
        before = view_dataset(session, get_dataset(session, waiting))
    assert before["status"] == "queued"
    assert before["counts"] == {"supervised": 0, "preference": 0, "labelled": 0, "holdout": 0}
    assert before["files"] == {"supervised": None, "preference": None, "labelled": None}
    shown = build(database, tmp_path, ALL_TRAIN)
    assert before.keys() == shown.keys()
    assert (shown["object"], shown["deployment"], shown["status"]) == (
        "dataset",
        "assistant",
        "ready",
    )
    assert shown["counts"] == {"supervised": 1, "preference": 1, "labelled": 0, "holdout": 0}
    assert [str(name)[:5] for name in shown["files"].values()] == ["file-", "file-", "None"]
    assert shown["holdout_files"] == {"supervised": None, "preference": None, "labelled": None}
    assert all(shown["openai_files"].values())
    assert (shown["dropped"], shown["error"]) == ({}, None)
    assert shown["policy_hash"] == ALL_TRAIN.hash
    assert type(shown["created_at"]) is type(shown["ready_at"]) is int


def test_the_trainer_and_the_evaluation_read_every_file(
    sqlite_database: Database, tmp_path: Path
) -> None:
    fill(sqlite_database)
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        answer = ask(session, ana, "Tools?", history=turns("Hi", "Yes?"), tools=tools)
        rate(session, ana, answer, "Something else altogether, please", "correction")
    shown = build(sqlite_database, tmp_path, ALL_TRAIN)
    with sqlite_database.read() as session:
        files = {
            (file.kind, file.dialect): tmp_path / file.path
            for file in list_dataset_files(session, shown["id"])
        }
    assert set(files) == {
        ("supervised", "trl"),
        ("supervised", "openai"),
        ("preference", "trl"),
        ("preference", "openai"),
        ("labelled", "trl"),
    }
    for kind in ("supervised", "preference"):
        ours, theirs = (read_for_training([files[kind, dialect]]) for dialect in ("trl", "openai"))
        assert len(ours) == shown["counts"][kind]
        for row, other in zip(ours, theirs, strict=True):
            assert row.completions == other.completions
            assert row.tools == other.tools
            unweighted = [
                {key: value for key, value in message.items() if key != "weight"}
                for message in other.prompt
            ]
            assert list(row.prompt) == unweighted
        assert any(row.tools and len(row.prompt) == 3 for row in ours)
    for (_, dialect), path in files.items():
        if dialect == "trl":
            evaluated = sorted(row["id"] for row in Holdout(HoldoutFiles([path], [])))
            assert evaluated == sorted(row.id for row in read_for_training([path]))


def test_only_what_the_deployment_answered_is_in_its_set(
    sqlite_database: Database, tmp_path: Path
) -> None:
    fill(sqlite_database)
    assert build(sqlite_database, tmp_path, ALL_TRAIN, "poet")["counts"]["labelled"] == 1
    nothing = build(sqlite_database, tmp_path, ALL_TRAIN, "nobody")
    assert set(nothing["counts"].values()) == {0}
    assert nothing["content_hash"] == hashlib.sha256().hexdigest()


def test_the_content_hash_is_that_of_what_was_said_in_whatever_order(
    sqlite_database: Database, postgres_database: Database, tmp_path: Path
) -> None:
    fill(sqlite_database)
    fill(postgres_database, random.Random(7).shuffle)
    one = build(sqlite_database, tmp_path)
    assert build(postgres_database, tmp_path / "other")["content_hash"] == one["content_hash"]
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        rate(session, ana, ask(session, ana, "One more?"), True)
    assert build(sqlite_database, tmp_path)["content_hash"] != one["content_hash"]


class Killed(BaseException):
    """As a signal would end it."""


def test_a_freeze_that_is_ended_anywhere_leaves_nothing_and_begins_anew(
    database: Database, tmp_path: Path
) -> None:
    fill(database)
    expected = build(database, tmp_path / "whole")
    dataset_id = create(database)
    calls = 0

    def end_at(number: int) -> Callable[[], None]:
        def check() -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed

        return check

    attempts, frozen = 0, None
    while frozen is None:
        attempts, calls = attempts + 1, 0
        try:
            frozen = freeze(database, dataset_id, data=tmp_path, check=end_at(attempts * 3))
        except Killed:
            assert list((tmp_path / "datasets").iterdir()) == []
    assert attempts > 5
    with database.write() as session:
        shown = view_dataset(session, finish_freeze(session, dataset_id, frozen))
    for key in ("content_hash", "counts", "dropped"):
        assert shown[key] == expected[key]


def test_what_a_killed_process_left_is_removed(sqlite_database: Database, tmp_path: Path) -> None:
    fill(sqlite_database)
    dataset_id = create(sqlite_database)
    partial = tmp_path / "datasets" / f"{dataset_id}.x1.partial"
    finished = tmp_path / "datasets" / dataset_id
    for folder in (partial, finished):  # killed in the middle, and once more before the end
        folder.mkdir(parents=True)
        (folder / "rows.spool").write_text("half a row")
    with sqlite_database.write() as session:
        session.add(
            DatasetRow(dataset_id=dataset_id, example_id="ex_old", kind="labelled", side="train")
        )
    frozen = freeze(sqlite_database, dataset_id, data=tmp_path, check=lambda: None)
    with sqlite_database.write() as session:
        finish_freeze(session, dataset_id, frozen)
        assert session.get(DatasetRow, (dataset_id, "ex_old")) is None
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == [dataset_id]
    assert not (finished / "rows.spool").exists()


def test_a_ready_set_never_changes(database: Database, tmp_path: Path) -> None:
    fill(database)
    dataset_id = create(database)
    late = freeze(database, dataset_id, data=tmp_path, check=lambda: None)
    frozen = freeze(database, dataset_id, data=tmp_path, check=lambda: None)
    with database.write() as session:
        finish_freeze(session, dataset_id, frozen)
    before = {path: path.read_bytes() for path in (tmp_path / "datasets").rglob("*.json*")}
    with pytest.raises(Conflict, match="never changes"):
        freeze(database, dataset_id, data=tmp_path, check=lambda: None)
    with database.write() as session, pytest.raises(Conflict, match="never changes"):
        finish_freeze(session, dataset_id, late)
    assert before == {path: path.read_bytes() for path in (tmp_path / "datasets").rglob("*.json*")}
    with database.read() as session:
        assert get_dataset(session, dataset_id).status == DatasetStatus.READY


def test_an_attempt_that_comes_too_late_replaces_nothing(
    sqlite_database: Database, tmp_path: Path
) -> None:
    fill(sqlite_database)
    dataset_id = create(sqlite_database)
    ended: list[Frozen] = []

    def overtake() -> None:
        if not ended:
            ended.append(freeze(sqlite_database, dataset_id, data=tmp_path, check=lambda: None))
            with sqlite_database.write() as session:
                finish_freeze(session, dataset_id, ended[0])

    with pytest.raises((Conflict, FileNotFoundError)):
        freeze(sqlite_database, dataset_id, data=tmp_path, check=overtake)
    for file in ended[0].files:
        content = (tmp_path / file.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256


def test_rows_of_another_attempt_are_not_made_ready(
    sqlite_database: Database, tmp_path: Path
) -> None:
    fill(sqlite_database)
    dataset_id = create(sqlite_database)
    frozen = freeze(sqlite_database, dataset_id, data=tmp_path, check=lambda: None)
    with sqlite_database.write() as session:
        session.delete(session.scalars(select(DatasetRow)).first())
        session.flush()
        with pytest.raises(Conflict, match="another attempt"):
            finish_freeze(session, dataset_id, frozen)


def test_a_second_freeze_extracts_only_what_moved(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(database)
    seen = count_extracted(monkeypatch)
    build(database, tmp_path)
    assert len(seen) == len(set(seen)) > 20
    with database.write() as session:
        unfinished = session.scalars(select(Answer.id).where(Answer.status == "started")).one()
        moved = session.scalars(select(Judgement).where(Judgement.kind == "stars")).one()
        root = make_viewer(session, "root", sees_all=True)
        withdraw(session, root, moved.id)
    seen.clear()
    shown = build(database, tmp_path, Policy(holdout_share=0.4, person_cap=7))
    assert sorted(seen) == sorted([str(moved.answer_id), unfinished])
    assert shown["dropped"]["person_cap"] > 0
    with database.write() as session:
        answer = session.get_one(Answer, moved.answer_id)
        whole = NewJudgement("comment", "Thanks", conversation_id=answer.conversation_id)
        judge(session, root, whole)
    seen.clear()
    build(database, tmp_path, Policy(holdout_share=0.4, person_cap=7))
    assert seen == [unfinished], "a verdict on a conversation teaches nothing of its answers"
    seen.clear()
    build(database, tmp_path, Policy(stars_true=3))
    assert len(seen) > 20, "another policy of extraction has a cache of its own"


def test_an_answer_judged_before_its_end_is_learned_after_it(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        answer_id = ask(session, ana, "Hi", status=None)
        rate(session, ana, answer_id, True)
    assert build(database, tmp_path, ALL_TRAIN)["dropped"] == {"unfinished": 1}
    with database.write() as session:
        end(session, _Started(answer_id, ana.person_id), turns("Hi"), ["Hello!"])
    assert build(database, tmp_path, ALL_TRAIN)["counts"]["labelled"] == 1


class _Started:
    """As much of a started answer as its end needs."""

    stored = True

    def __init__(self, answer_id: str, person_id: str) -> None:
        self.id, self.person_id = answer_id, person_id


def test_an_answer_deleted_after_the_first_freeze_is_in_no_later_one(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        names = [ask(session, ana, "Hi", reply) for reply in ("Hello", "CANARY")]
        compare(session, ana, NewComparison((names[0], names[1]), "a"))
    assert build(database, tmp_path, ALL_TRAIN)["counts"]["preference"] == 1
    with database.write() as session:
        delete_answer(session, session.get_one(Answer, names[1]))
        assert session.scalar(select(func.count()).select_from(Extraction)) == 0
    assert set(build(database, tmp_path, ALL_TRAIN)["counts"].values()) == {0}


def test_a_person_who_goes_takes_what_they_said_about_others_along(
    database: Database, tmp_path: Path
) -> None:
    with database.write() as session:
        ana, root = make_viewer(session, "ana"), make_viewer(session, "root", sees_all=True)
        pair = [ask(session, ana, "Which?", reply) for reply in ("Yes", "No way")]
        compare(session, root, NewComparison((pair[0], pair[1]), "a"))
        rate(session, root, ask(session, ana), "CANARY, said by somebody else", "correction")
        rate(session, ana, ask(session, ana, "Mine?"), True)
    before = build(database, tmp_path, ALL_TRAIN)["counts"]
    assert (before["supervised"], before["preference"], before["labelled"]) == (1, 2, 1)
    with database.write() as session:
        extractions.forget_person(session, root.person_id)
        session.delete(session.get_one(Person, root.person_id))
    with database.read() as session:
        left = session.scalars(select(Extraction)).all()
        assert "CANARY" not in str([one.examples for one in left])
    after = build(database, tmp_path, ALL_TRAIN)["counts"]
    assert (after["supervised"], after["preference"], after["labelled"]) == (0, 0, 1)


def test_nothing_held_out_is_trained_on_however_it_is_spelt(
    sqlite_database: Database, tmp_path: Path
) -> None:
    with sqlite_database.write() as session:
        ana = make_viewer(session, "ana")
        for number in range(12):
            for spelling in ("Tell me about {}.", "tell me, about {}!", "TELL me about '{}'"):
                rate(session, ana, ask(session, ana, spelling.format(number)), True)
    shown = build(sqlite_database, tmp_path, Policy(holdout_share=0.3))
    words: dict[str | None, set[str]] = {"train": set(), "holdout": set()}
    with sqlite_database.read() as session:
        for file in list_dataset_files(session, shown["id"]):
            for line in (tmp_path / file.path).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                said = row["prompt"][-1]["content"].casefold()
                words[file.side].add("".join(filter(str.isalnum, said)))
    assert all(words.values())
    assert not words["train"] & words["holdout"]
    assert shown["dropped"]["near_holdout"] > 0


def test_excluded_people_teach_nothing(sqlite_database: Database, tmp_path: Path) -> None:
    fill(sqlite_database)
    with sqlite_database.read() as session:
        ana = session.scalars(select(Person.id).where(Person.user == "ana")).one()
    policy = Policy(holdout_share=0.0, excluded_people=(ana,))
    shown = build(sqlite_database, tmp_path, policy)
    assert shown["counts"] == {"supervised": 0, "preference": 0, "labelled": 1, "holdout": 0}
    assert shown["dropped"]["excluded_person"] > 20


def test_what_became_of_a_verdict_is_told(database: Database, tmp_path: Path) -> None:
    with database.write() as session:
        ana = make_viewer(session, "ana")
        answer_id = ask(session, ana, reply="Water that falls from the clouds above us all")
        small = "Water which falls from the clouds above us all"
        correction = rate(session, ana, answer_id, small, "correction")
        comment = rate(session, ana, answer_id, "Nice", "comment")
        pair = [ask(session, ana, "Which?", reply) for reply in ("Yes", "No way")]
        comparison, _ = compare(session, ana, NewComparison((pair[0], pair[1]), "both_bad"))
        talk = session.get_one(Answer, answer_id).conversation_id
        about, _ = judge(session, ana, NewJudgement("rating", True, conversation_id=talk))
        assert what_became(session, correction) == {"examples": [], "datasets": [], "drops": []}
    policy = Policy(holdout_share=0.0, min_edit_share=0.5)
    shown = build(database, tmp_path, policy)
    create(database)
    with database.read() as session:
        became = what_became(session, correction)
        (example,) = became["examples"]
        assert example["kind"] == "supervised"
        assert became["datasets"] == [
            {
                "id": shown["id"],
                "deployment": "assistant",
                "example_id": example["id"],
                "kind": "supervised",
                "side": "train",
            }
        ]
        assert became["drops"] == [{"reason": "small_edit", "kind": "preference"}]
        assert what_became(session, comment)["drops"] == [
            {"reason": "teaches_nothing", "kind": None}
        ]
        assert [one["kind"] for one in what_became(session, comparison.id)["datasets"]] == [
            "labelled",
            "labelled",
        ]
        assert what_became(session, about.id)["drops"] == [
            {"reason": "whole_conversation", "kind": None}
        ]


def test_sets_are_listed_newest_first_within_the_viewers_deployments(database: Database) -> None:
    ids = [create(database, SPLIT, name) for name in ("a", "b", "a")]
    with database.read() as session:
        newest = sorted(ids, reverse=True)
        first, more = list_datasets(session, limit=2)
        rest, no_more = list_datasets(session, after=first[-1].id, limit=2)
        assert [one.id for one in first + rest] == newest
        assert (more, no_more) == (True, False)
        assert [one.id for one in list_datasets(session, deployments=["b"])[0]] == [ids[1]]
        assert list_datasets(session, deployments=[]) == ([], False)
        for call in (get_dataset, lambda session, after: list_datasets(session, after=after)):
            with pytest.raises(NotFound, match="'ds_9'"):
                call(session, "ds_9")
        assert session.scalars(select(Dataset.status)).all() == ["queued"] * 3
