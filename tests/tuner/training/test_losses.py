"""Our losses are TRL's: its own trainers, run on the same examples and adapter, are the oracle."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuner.training.runs import build_config, example, supervised_rows
from tuner.training.labelled import mismatch
from tuner.training.layout import pack, sequences_of
from tuner.training.losses import (
    apo_zero_unpaired_loss,
    dpo_loss,
    kto_loss,
    supervised_loss,
)
from tuner.training.model import TunedModel
from tuner.training.objective import Objective, add_metrics
from tuner.training.rendering import RenderedExample

# TRL warns about its own settings and of what its libraries do.
pytestmark = pytest.mark.filterwarnings("default")


def pairs() -> list[RenderedExample]:
    source = random.Random(3)

    def tokens(low: int, high: int) -> list[int]:
        return [source.randrange(3, 259) for _ in range(source.randint(low, high))]

    return [example(tokens(4, 20), tokens(2, 9), tokens(2, 9), name=str(n)) for n in range(5)]


def all_kinds() -> tuple[list[RenderedExample], list[RenderedExample]]:
    """Two examples of every kind, and one more of each."""
    answers = [(one.prompt, one.completions[0], one.completions[1]) for one in pairs()]
    made = [
        [
            example(prompt, chosen, name=f"s{index}"),
            example(prompt, chosen, rejected, name=f"p{index}"),
            example(prompt, chosen, name=f"l{index}", label=index != 1),
        ]
        for index, (prompt, chosen, rejected) in enumerate(answers[:3])
    ]
    return [*made[0], *made[1]], made[2]


@pytest.fixture
def tuned(tmp_path: Path, tiny_model: Path) -> TunedModel:
    """The tiny model with an adapter that moved away from the base."""
    config = build_config(
        tmp_path,
        tiny_model,
        supervised_rows(1),
        method="combined",
        sft_weight=0.7,
        labelled_loss="kto",
    )
    torch.set_num_threads(1)
    model = TunedModel(config)
    random_ = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters.values():
            value.add_(0.05 * torch.randn(value.shape, generator=random_))
    return model


def our_loss(
    model: TunedModel, examples: list[RenderedExample], **settings: Any
) -> tuple[float, dict[str, float]]:
    """The step's loss in forward passes of at most 40 tokens, as the loop would add it up."""
    config = model._config.model_copy(update={"batch_tokens": 40, **settings})
    objective = Objective(config, model, examples)
    with model.base_only():
        for one in (*examples, *objective.mismatched):
            found = model.sequence_logprobs(sequences_of(one))
            objective.references[one.content_hash] = tuple(value.numpy() for value in found)
    metrics: dict[str, float] = {}
    passes = pack(examples, max_tokens=config.batch_tokens)
    assert (len(passes) > 1) is (config.batch_tokens == 40)
    whole = objective.take_whole(examples)
    for passed in passes:
        loss, found_metrics = objective.part(passed, whole)
        loss.backward()
        add_metrics(metrics, found_metrics)
    return metrics["loss"], metrics


def gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in parameters.items()}


def trl_trainer(kind: str, model: TunedModel, folder: Path, **settings: Any) -> Any:
    """TRL's trainer over the same base, its adapter set to ours."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    config = model._config
    # Only to satisfy the trainer; the loss is asked for other examples.
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": True}
    columns = {
        "DPO": ["prompt", "chosen", "rejected"],
        "SFT": ["prompt", "completion"],
        "KTO": ["prompt", "completion", "label"],
    }[kind]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(config.base_path),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **settings
        ),
        train_dataset=Dataset.from_list([{name: row[name] for name in columns}] * 2),
        processing_class=model.tokenizer,
        peft_config=LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=list(model.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    ours = model.adapter_state()
    with torch.no_grad():
        for name, value in trl_parameters(trainer).items():
            value.copy_(ours[name])
    trainer.model.eval()
    return trainer


def trl_parameters(trainer: Any) -> dict[str, torch.nn.Parameter]:
    return {
        name.replace(".default.weight", ".weight"): value
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }


def test_dpo_with_its_likelihood_term_is_trls(tuned: TunedModel, tmp_path: Path) -> None:
    examples = pairs()
    found, metrics = our_loss(tuned, examples)
    trainer = trl_trainer(
        "DPO", tuned, tmp_path, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7]
    )
    batch = trainer.data_collator(
        [
            {
                "prompt_ids": list(one.prompt),
                "chosen_ids": list(one.completions[0]),
                "rejected_ids": list(one.completions[1]),
            }
            for one in examples
        ]
    )
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()

    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    theirs = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    assert metrics["accuracy"] == pytest.approx(theirs["rewards/accuracies"])
    assert metrics["margin"] == pytest.approx(theirs["rewards/margins"], abs=1e-5)
    assert metrics["chosen_reward"] == pytest.approx(theirs["rewards/chosen"], abs=1e-5)
    assert abs(metrics["margin"]) > 1e-3  # an adapter without effect would prove nothing
    our_gradients = gradients(tuned.parameters)
    for name, gradient in gradients(trl_parameters(trainer)).items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_supervised_loss_is_trls(tuned: TunedModel, tmp_path: Path) -> None:
    examples = [example(one.prompt, one.completions[0], name=one.id) for one in pairs()]
    found, _ = our_loss(tuned, examples)
    trainer = trl_trainer("SFT", tuned, tmp_path)
    batch = trainer.data_collator(
        [
            {
                "input_ids": [*one.prompt, *one.completions[0]],
                "labels": [-100] * len(one.prompt) + list(one.completions[0]),
            }
            for one in examples
        ]
    )
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()

    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    our_gradients = gradients(tuned.parameters)
    for name, gradient in gradients(trl_parameters(trainer)).items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_the_loss_of_labelled_examples_is_trls(
    tuned: TunedModel, tmp_path: Path, loss: str
) -> None:
    examples = [
        example(one.prompt, one.completions[0], name=one.id, label=index % 3 > 0)
        for index, one in enumerate(pairs())
    ]
    partners = mismatch(examples, max_length=400)
    found, metrics = our_loss(
        tuned, examples, labelled_loss=loss, desirable_weight=0.8, undesirable_weight=1.3
    )
    trainer = trl_trainer(
        "KTO",
        tuned,
        tmp_path,
        beta=0.1,
        loss_type=loss,
        desirable_weight=0.8,
        undesirable_weight=1.3,
    )
    rows = [
        {
            "prompt_ids": list(one.prompt),
            "completion_ids": list(one.completions[0]),
            "KL_completion_ids": list(partners[one.content_hash].completions[0]),
            "label": one.label,
        }
        for one in examples
    ]
    if loss != "kto":
        for row in rows:
            del row["KL_completion_ids"]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected.backward()

    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    theirs = {name: values[0] for name, values in trainer._metrics["eval"].items()}
    assert metrics.get("labelled_kl", 0.0) == pytest.approx(theirs["kl"], abs=1e-5)
    assert (theirs["kl"] > 1e-3) is (loss == "kto")  # a point at zero would prove nothing
    assert metrics["labelled_true_reward"] == pytest.approx(theirs["rewards/chosen"], abs=1e-5)
    assert metrics["labelled_false_reward"] == pytest.approx(theirs["rewards/rejected"], abs=1e-5)
    our_gradients = gradients(tuned.parameters)
    for name, gradient in gradients(trl_parameters(trainer)).items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_supervised_examples_beside_pairs_weigh_by_their_number(tuned: TunedModel) -> None:
    two_kinds = pairs()
    more = [example(one.prompt, one.completions[1], name=f"s{one.id}") for one in two_kinds[:3]]
    both, _ = our_loss(tuned, [*two_kinds, *more])
    alone, _ = our_loss(tuned, two_kinds)
    likelihood, _ = our_loss(tuned, more)
    assert both == pytest.approx((5 * alone + 3 * likelihood) / 8, abs=1e-5)


def test_copied_tokens_weigh_less_and_pairs_compare_whole_answers(tuned: TunedModel) -> None:
    (pair, *_) = pairs()
    chosen = pair.completions[0]
    marks = tuple(index % 2 == 0 for index in range(len(chosen)))
    correction = replace(example(pair.prompt, chosen, name="s"), changed=marks)
    (logprobs,) = tuned.sequence_logprobs([(pair.prompt, chosen)])
    weights = torch.tensor([1.0 if mark else 0.25 for mark in marks])
    expected = -float((weights * logprobs.detach()).sum() / weights.sum())
    settings = {"copied_weight": 0.25, "batch_tokens": 10_000}
    assert our_loss(tuned, [correction], **settings)[0] == pytest.approx(expected, abs=1e-5)
    _, plain = our_loss(tuned, [pair], **settings)
    _, marked = our_loss(tuned, [replace(pair, changed=marks)], **settings)
    assert marked["chosen_nll"] == pytest.approx(expected, abs=1e-5)
    assert marked["dpo"] == pytest.approx(plain["dpo"], abs=1e-6)


def test_a_weight_counts_like_a_repetition() -> None:
    once, weights = torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 1.0])
    twice = torch.tensor([-1.0, -1.0, -3.0])
    assert float(supervised_loss(once, weights)[0]) == pytest.approx(
        float(supervised_loss(twice)[0])
    )
    zero = torch.zeros(3)
    weighted, _ = dpo_loss(once, zero[:2], beta=0.5, weights=weights)
    repeated, _ = dpo_loss(twice, zero, beta=0.5)
    assert float(weighted) == pytest.approx(float(repeated))
    for kl in (torch.tensor(-1.0), torch.tensor(0.5)):
        labelled = {"beta": 0.5, "desirable_weight": 2.0}
        one, of_one = kto_loss(once, zero[:1], kl, weights=(weights, weights[:1]), **labelled)
        other, of_other = kto_loss(twice, zero[:2], kl, **labelled)
        assert float(one) == pytest.approx(float(other))
        assert of_one == pytest.approx(of_other)


def test_a_weight_counts_like_a_repetition_in_a_step_of_all_kinds(tuned: TunedModel) -> None:
    once, more = all_kinds()
    weighed = [replace(one, weight=2.0) for one in more]
    found, metrics = our_loss(tuned, [*once, *weighed])
    repeated, of_repeated = our_loss(tuned, [*once, *more, *more])
    assert found == pytest.approx(repeated, abs=1e-5)
    assert metrics["labelled_kl"] == pytest.approx(of_repeated["labelled_kl"], abs=1e-4)
    assert metrics["labelled_kl"] > 1e-3


def test_the_parts_of_forward_passes_are_the_whole(tuned: TunedModel) -> None:
    examples = [one for part in all_kinds() for one in part]
    parts, metrics = our_loss(tuned, examples)
    of_parts = gradients(tuned.parameters)
    for value in tuned.parameters.values():
        value.grad = None
    whole, of_whole = our_loss(tuned, examples, batch_tokens=10_000)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert metrics == pytest.approx(of_whole, abs=1e-4)
    for name, gradient in gradients(tuned.parameters).items():
        torch.testing.assert_close(of_parts[name], gradient, atol=1e-5, rtol=1e-4)


def test_the_reference_point_has_no_gradient_and_is_not_below_zero() -> None:
    true, false = torch.tensor([0.3], requires_grad=True), torch.tensor([-0.2])
    kl = torch.tensor(0.4, requires_grad=True)
    loss, _ = kto_loss(true, false, kl, beta=1.0)
    loss.backward()
    assert (kl.grad, true.grad is None) == (None, False)
    for below in (-3.0, 0.0):
        assert kto_loss(true, false, torch.tensor(below), beta=1.0) == apo_zero_unpaired_loss(
            true, false, beta=1.0
        )


def test_the_base_itself_scores_one_half() -> None:
    loss, metrics = dpo_loss(torch.zeros(4), torch.zeros(4), beta=0.1)
    assert float(loss) == pytest.approx(math.log(2))
    assert metrics["accuracy"] == 0.5
