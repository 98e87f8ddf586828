"""Runs of the tiny model from rows to adapter, in this process."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engines.proof import FLOOR_NATS, Outcome, judge
from tests.tuner.training.runs import (
    build_config,
    labelled_rows,
    preference_rows,
    supervised_rows,
    train_here,
    write_rows,
)
from tuner.adapter_checks import check_adapter
from tuner.adapters import content_hash
from tuner.base_models import describe_base
from tuner.methods import Method
from tuner.training import loop
from tuner.training.config import TrainingConfig
from tuner.training.data import NothingToLearn
from tuner.training.guards import GuardStopped
from tuner.training.loop import learning_rate
from tuner.training.model import TunedModel
from tuner.training.probe import MAX_TOKENS
from tuner.training.rows import DataError, group_of

Events = list[dict[str, Any]]


def of(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


def mixed_rows() -> list[dict[str, Any]]:
    return preference_rows(7) + supervised_rows(4)


def rows_for(method: str) -> list[dict[str, Any]]:
    """Rows of every kind that the method reads, eleven or more."""
    return {
        "supervised": supervised_rows(11),
        "dpo": mixed_rows(),
        "kto": labelled_rows(11),
        "combined": preference_rows(4) + supervised_rows(3) + labelled_rows(7, seed=1),
    }[method]


@pytest.mark.parametrize("method", Method)
def test_a_run_ends_with_an_adapter_that_engines_can_prove(
    tmp_path: Path, tiny_model: Path, method: str
) -> None:
    rows = rows_for(method)
    events = train_here(build_config(tmp_path, tiny_model, rows, method=method))
    finished = events[-1]
    assert finished["event"] == "finished"
    facts = check_adapter(
        Path(finished["adapter"]),
        base_name="tiny",
        base_revision="r1",
        max_rank=4,
        shapes=describe_base(tiny_model, "tiny", "r1").linear_modules,
    )
    assert facts.dtype == "float32"

    probe = finished["probe"]
    assert 4 <= len(probe["prompts"]) <= 6
    assert all(2 < len(prompt) <= MAX_TOKENS for prompt in probe["prompts"])
    assert [len(prompt) - 1 for prompt in probe["prompts"]] == [
        len(figures) for figures in probe["adapter"]
    ]
    proof = judge(probe, probe["base"], probe["adapter"])
    assert proof.outcome == Outcome.PROVEN
    assert proof.effect > 10 * FLOOR_NATS
    assert judge(probe, probe["base"], probe["base"]).outcome == Outcome.NOT_ACTIVE

    manifest = finished["manifest"]
    assert manifest["seeds"] == {"training": 0}
    assert (manifest["data_hash"], manifest["base_revision"]) == ("d1", "r1")
    assert {"torch", "transformers", "peft", "python"} <= manifest["versions"].keys()
    assert manifest["examples"] == sum(manifest["kinds"].values()) == len(rows)
    steps = of(events, "step")
    assert steps[-1]["step"] == steps[-1]["steps"] == manifest["steps"]
    assert steps[-1]["tokens_per_second"] > 0


def test_the_loss_falls_on_what_is_taught(tmp_path: Path, tiny_model: Path) -> None:
    config = build_config(
        tmp_path, tiny_model, supervised_rows(4), epochs=15, learning_rate=5e-3, warmup_ratio=0
    )
    steps = of(train_here(config), "step")
    assert steps[-1]["nll"] < 0.5 * steps[0]["nll"]


def test_dpo_prefers_what_people_chose(tmp_path: Path, tiny_model: Path) -> None:
    config = build_config(
        tmp_path, tiny_model, preference_rows(4), method="dpo", epochs=10, learning_rate=3e-3
    )
    steps = of(train_here(config), "step")
    assert steps[0]["dpo"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1]["accuracy"] == 1.0
    assert steps[-1]["margin"] > 0.5


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_tells_good_answers_from_bad_ones(tmp_path: Path, tiny_model: Path, loss: str) -> None:
    rows = labelled_rows(6)
    config = build_config(
        tmp_path,
        tiny_model,
        rows,
        method="kto",
        labelled_loss=loss,
        batch_size=6,
        epochs=10,
        learning_rate=3e-3,
    )
    events = train_here(config)
    computed = "6 labelled examples" + (" and 6 mismatched answers" if loss == "kto" else "")
    assert of(events, "references")[0]["message"].endswith(f"the base says about {computed}.")
    steps = of(events, "step")
    assert steps[0]["labelled_true_reward"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["labelled_accuracy"] == 1.0
    assert steps[-1]["labelled_true_reward"] > 0.2 > -0.2 > steps[-1]["labelled_false_reward"]
    assert ("labelled_kl" in steps[-1]) is (loss == "kto")


@pytest.mark.parametrize("method", Method)
def test_equal_runs_make_equal_bytes(tmp_path: Path, tiny_model: Path, method: str) -> None:
    hashes = []
    for index, seed in enumerate((5, 5, 6)):
        config = build_config(
            tmp_path / str(index),
            tiny_model,
            rows_for(method),
            method=method,
            seed=seed,
            lora_dropout=0.1,
            # A cache that is filled gives the same as an empty one.
            references_dir=tmp_path / "references",
        )
        hashes.append(content_hash(Path(train_here(config)[-1]["adapter"])))
    assert hashes[0] == hashes[1] != hashes[2]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("method", "rows", "changes"),
    [
        ("supervised", supervised_rows(14), {}),
        ("kto", labelled_rows(9), {"epochs": 2, "checkpoint_every_steps": 1}),
        (
            "kto",
            labelled_rows(9),
            {"epochs": 2, "checkpoint_every_steps": 1, "labelled_loss": "apo_zero_unpaired"},
        ),
        (
            "combined",
            labelled_rows(5) + supervised_rows(3) + preference_rows(3),
            {"epochs": 2, "checkpoint_every_steps": 1, "labelled_loss": "kto"},
        ),
    ],
    ids=["supervised", "kto", "apo_zero_unpaired", "combined"],
)
def test_a_run_that_ends_after_any_event_resumes_to_the_same_bytes(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(loop, "_SECONDS_BETWEEN_EVENTS", 0.0)

    def config(name: str) -> TrainingConfig:
        return build_config(
            tmp_path / name,
            tiny_model,
            rows,
            **{
                "method": method,
                "lora_dropout": 0.1,
                "validation_share": 0.4,
                "min_validation": 2,
                "patience": None,
                "epochs": 3,
                "checkpoint_every_steps": 2,
                **changes,
            },
        )

    whole = train_here(config("whole"))
    assert of(whole, "validation")
    expected = content_hash(Path(whole[-1]["adapter"]))
    resumed: set[int] = set()
    # Each attempt lives for one event longer than the one before.
    for lives in range(2, 30):
        seen: Events = []

        def emit(event: dict[str, Any], seen: Events = seen, lives: int = lives) -> None:
            seen.append(event)
            if len(seen) == lives:
                raise Killed

        try:
            loop.train(config("killed"), emit)
        except Killed:
            continue
        finally:
            resumed.add(seen[0].get("resumed_at_step", 0))
        break
    assert content_hash(Path(seen[-1]["adapter"])) == expected
    assert len(resumed) > 2


def test_a_damaged_checkpoint_is_told_and_passed_over(tmp_path: Path, tiny_model: Path) -> None:
    config = build_config(tmp_path, tiny_model, supervised_rows(8))
    expected = content_hash(Path(train_here(config)[-1]["adapter"]))
    newest = max((config.output_dir / loop.CHECKPOINTS_FOLDER).iterdir())
    (newest / "optimizer.safetensors").write_bytes(b"damaged")
    events = train_here(config)
    assert "'optimizer.safetensors' has changed" in events[0]["message"]
    assert events[0]["resumed_at_step"] == 3
    assert content_hash(Path(events[-1]["adapter"])) == expected


@pytest.mark.parametrize("change", ["rows", "seed"])
def test_other_data_or_settings_begin_anew(tmp_path: Path, tiny_model: Path, change: str) -> None:
    train_here(build_config(tmp_path, tiny_model, supervised_rows(8)))
    rows = supervised_rows(8, seed=1 if change == "rows" else 0)
    seed = 1 if change == "seed" else 0
    started = train_here(build_config(tmp_path, tiny_model, rows, seed=seed))[0]
    assert "resumed_at_step" not in started
    assert "other settings, data or libraries" in started["message"]


def test_training_ends_early_and_keeps_the_best_epoch(tmp_path: Path, tiny_model: Path) -> None:
    config = build_config(
        tmp_path,
        tiny_model,
        supervised_rows(24),
        epochs=20,
        learning_rate=2e-2,
        validation_share=0.4,
        min_validation=2,
        max_kl=None,
        patience=2,
    )
    events = train_here(config)
    losses = {event["epoch"]: event["loss"] for event in of(events, "validation")}
    losses.pop(0)  # of the base: for comparison alone
    best = min(losses, key=lambda epoch: losses[epoch])
    assert len(losses) == best + 2 < 20
    finished = events[-1]
    assert finished["manifest"]["best_epoch"] == best
    assert finished["metrics"]["validation_loss"] == losses[best]
    assert f"best after epoch {best}" in finished["message"]

    # Started from the adapter that was handed over, a run begins with that epoch's loss.
    again = config.model_copy(
        update={
            "warm_start": Path(finished["adapter"]),
            "output_dir": tmp_path / "again",
            "epochs": 1,
        }
    )
    assert of(train_here(again), "validation")[0]["loss"] == losses[best]


def splits(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`rows` as a share of 0.4 divides them: training, validation."""
    held = [int(group_of(row["prompt"])[:8], 16) < 0.4 * 2**32 for row in rows]
    sides = [[row for row, is_held in zip(rows, held, strict=True) if is_held is side]
             for side in (False, True)]  # fmt: skip
    return sides[0], sides[1]


@pytest.mark.parametrize("method", Method)
def test_a_validation_file_takes_the_place_of_the_share(
    tmp_path: Path, tiny_model: Path, method: str
) -> None:
    rows = supervised_rows(14) if method == "supervised" else rows_for(method)
    changes: dict[str, Any] = {
        "method": method,
        "validation_share": 0.4,
        "min_validation": 2,
        "epochs": 4,
        "learning_rate": 2e-2,
        "max_kl": None,
        "max_chosen_drop": None,
    }
    shared = train_here(build_config(tmp_path / "shared", tiny_model, rows, **changes))
    training, held = splits(rows)
    file = write_rows(tmp_path / "held.jsonl", held)
    alone = train_here(
        build_config(
            tmp_path / "alone", tiny_model, training, **changes | {"min_validation": 100},
            validation_file=file,
        )
    )  # fmt: skip

    assert len(of(alone, "validation")) > 2
    assert of(alone, "validation") == of(shared, "validation")
    ends = [events[-1] for events in (shared, alone)]
    assert content_hash(Path(ends[0]["adapter"])) == content_hash(Path(ends[1]["adapter"]))
    before, after = (end["manifest"] for end in ends)
    assert after["validation_examples"] == before["validation_examples"] == len(held)
    assert after["validation_file"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "validation_file" not in before
    assert f"{len(held)} of the validation file" in of(alone, "started")[0]["message"]


def test_rows_near_the_validation_file_never_train(tmp_path: Path, tiny_model: Path) -> None:
    rows, held = supervised_rows(6), supervised_rows(3, seed=1)
    question = held[0]["prompt"][0]["content"]
    same_words = {**rows[0], "id": "w", "prompt": [{"role": "user", "content": f"“{question}”!"}]}
    goes_on = [
        {"role": "user", "content": question.upper()},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    near = [held[0], same_words, {**rows[0], "id": "c", "prompt": goes_on}]
    file = write_rows(tmp_path / "held.jsonl", [*held, *preference_rows(2)])
    ends = [
        train_here(
            build_config(tmp_path / name, tiny_model, trained, validation_file=file)
        )[-1]
        for name, trained in (("clean", rows), ("mixed", [*rows, *near]))
    ]  # fmt: skip

    clean, mixed = (end["manifest"] for end in ends)
    assert content_hash(Path(ends[0]["adapter"])) == content_hash(Path(ends[1]["adapter"]))
    assert (clean["examples"], mixed["examples"]) == (6, 6)
    assert (clean["dropped"], mixed["dropped"]) == ({}, {"near_validation": 3})
    assert mixed["validation_dropped"] == {"other_kind": 2}

    with pytest.raises(NothingToLearn, match="3 dropped as near_validation") as refused:
        train_here(build_config(tmp_path / "none", tiny_model, near, validation_file=file))
    assert "give others" in str(refused.value)


def test_a_run_is_another_when_its_validation_file_changes(
    tmp_path: Path, tiny_model: Path
) -> None:
    file = write_rows(tmp_path / "held.jsonl", supervised_rows(3, seed=1))
    config = build_config(tmp_path, tiny_model, supervised_rows(6), validation_file=file)
    assert "resumed_at_step" not in train_here(config)[0]
    assert train_here(config)[0]["resumed_at_step"] == 4
    write_rows(file, supervised_rows(3, seed=2))
    begun = train_here(config)[0]
    assert "resumed_at_step" not in begun
    assert "other settings, data or libraries" in begun["message"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (preference_rows(2), r"up/held\.jsonl: nothing is left to validate with \(2 dropped as "),
        ([], r"up/held\.jsonl: nothing is left to validate with \(the file is empty\)"),
        ([{"prompt": "no messages", "completion": []}], r"up/held\.jsonl, line 1: "),
    ],
)
def test_a_validation_file_that_cannot_serve_is_named(
    tmp_path: Path, tiny_model: Path, rows: list[dict[str, Any]], said: str
) -> None:
    (tmp_path / "up").mkdir()
    file = write_rows(tmp_path / "up" / "held.jsonl", rows)
    config = build_config(tmp_path, tiny_model, supervised_rows(4), validation_file=file)
    with pytest.raises(DataError, match=said):
        train_here(config)


@pytest.mark.parametrize(
    ("code", "said", "rows", "changes"),
    [
        ("guard_kl", r"KL\(tuned \|\| base\) is", supervised_rows(8), {"max_kl": 1e-6}),
        (
            "guard_chosen_drop",
            "the chosen answers have lost",
            preference_rows(8),
            # Without its likelihood term and far too fast, DPO pushes both answers down.
            {
                "method": "dpo",
                "sft_weight": None,
                "learning_rate": 0.3,
                "max_chosen_drop": 0.5,
                "max_kl": None,
                "epochs": 4,
            },
        ),
        (
            "guard_chosen_drop",
            "the answers labelled true have lost .* a larger beta",
            labelled_rows(8),
            {
                "method": "kto",
                "learning_rate": 0.3,
                "max_chosen_drop": 0.5,
                "max_kl": None,
                "epochs": 4,
            },
        ),
    ],
)
def test_a_guard_stops_the_run_with_its_reason(
    tmp_path: Path,
    tiny_model: Path,
    code: str,
    said: str,
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
) -> None:
    config = build_config(tmp_path, tiny_model, rows, **changes)
    with pytest.raises(GuardStopped, match=said) as stopped:
        train_here(config)
    assert stopped.value.code == code
    assert not (config.output_dir / loop.ADAPTER_FOLDER).exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = build_config(tmp_path, tiny_model, supervised_rows(8))

    def spoiled(self: TunedModel, sequences: Any) -> list[torch.Tensor]:
        found = plain(self, sequences)
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return found
        if where == "loss":
            return [value * math.nan for value in found]
        for value in found:
            value.register_hook(lambda gradient: gradient * math.inf)
        return found

    plain = TunedModel.sequence_logprobs
    monkeypatch.setattr(TunedModel, "sequence_logprobs", spoiled)
    with pytest.raises(GuardStopped, match=f"The {where} of step 1 is") as stopped:
        train_here(config)
    assert stopped.value.code == "guard_not_finite"


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (preference_rows(3), {}, r"3 dropped as other_kind \(choose the method"),
        (
            supervised_rows(2),
            {"max_length": 20},
            r"2 dropped as too_long \(raise max_length\)\)\. "
            r"The longest row has \d\d tokens, and max_length allows 20\.",
        ),
        (supervised_rows(2), {"method": "dpo"}, "needs preference examples and found none"),
        ([], {}, "the files are empty"),
    ],
)
def test_a_run_without_anything_to_learn_says_why(
    tmp_path: Path,
    tiny_model: Path,
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(NothingToLearn, match=said):
        train_here(build_config(tmp_path, tiny_model, rows, **changes))


def test_nothing_to_learn_is_told_before_the_model_is_loaded(
    tmp_path: Path, tiny_model: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").write_bytes(b"no weights")
    config = build_config(tmp_path, base, supervised_rows(2), max_length=20)
    with pytest.raises(NothingToLearn, match="2 dropped as too_long"):
        train_here(config)


def test_a_missing_file_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    config = build_config(tmp_path, tiny_model, supervised_rows(2))
    config.train_files[0].unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: the file is missing"):
        train_here(config)


def test_the_rate_rises_to_its_peak_and_falls_without_reaching_zero(tmp_path: Path) -> None:
    config = build_config(tmp_path, tmp_path, [], learning_rate=1.0, warmup_ratio=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] > 0
    assert learning_rate(config, 0, 1) == 1.0
