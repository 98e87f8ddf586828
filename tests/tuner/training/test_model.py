"""The base with an adapter in it, and the adapter's canonical files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuner.training.runs import build_config, supervised_rows
from tuner.adapter_checks import check_adapter
from tuner.adapters import AdapterRefused, content_hash
from tuner.base_models import describe_base
from tuner.training.config import ConfigError
from tuner.training.model import TunedModel

SEQUENCES = [((5, 6, 7), (8, 9, 2)), ((5, 6), (10, 2))]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build_model(folder: Path, base: Path, **changes: Any) -> TunedModel:
    return TunedModel(build_config(folder, base, supervised_rows(1), **changes))


def move(model: TunedModel, by: float = 0.1) -> None:
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.parameters.values():
            value.add_(by * torch.randn(value.shape, generator=random))


def figures(model: TunedModel) -> torch.Tensor:
    with model.evaluating():
        return torch.cat(model.sequence_logprobs(SEQUENCES))


def test_the_files_are_what_check_adapter_accepts(tmp_path: Path, tiny_model: Path) -> None:
    model = build_model(tmp_path, tiny_model)
    move(model)
    model.save_adapter(tmp_path / "adapter")
    base = describe_base(tiny_model, "tiny", "r1")
    facts = check_adapter(
        tmp_path / "adapter",
        base_name="tiny",
        base_revision="r1",
        max_rank=8,
        shapes=base.linear_modules,
    )
    assert (facts.r, facts.dtype) == (4, "float32")
    # All linear layers, and the base's own list of them is the same.
    assert set(facts.target_modules) == {name.rpartition(".")[2] for name in base.linear_modules}
    shapes = [4 * (rows + columns) for rows, columns in base.linear_modules.values()]
    assert facts.parameters == sum(shapes)


def test_peft_reads_the_files_to_the_same_answers(tmp_path: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = build_model(tmp_path, tiny_model)
    move(model)
    model.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([[5, 6, 7, 8, 9, 2]])).logits[0].log_softmax(-1)
    expected = logits[[2, 3, 4], [8, 9, 2]]
    torch.testing.assert_close(figures(model)[:3], expected, atol=1e-4, rtol=1e-5)


def test_the_seed_fixes_the_adapter(tmp_path: Path, tiny_model: Path) -> None:
    hashes = []
    for index, seed in enumerate((3, 3, 4)):
        model = build_model(tmp_path, tiny_model, seed=seed)
        model.save_adapter(tmp_path / str(index))
        hashes.append(content_hash(tmp_path / str(index)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_new_adapter_changes_nothing_and_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = build_model(tmp_path, tiny_model)
    with model.base_only():
        base = torch.cat(model.sequence_logprobs(SEQUENCES))
    assert torch.equal(figures(model), base)
    model.save_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterRefused, match="every B matrix is zero"):
        check_adapter(tmp_path / "adapter", base_name="tiny", base_revision="r1", max_rank=8)
    move(model)
    assert (figures(model) - base).abs().mean() > 1e-2
    with model.base_only():
        assert torch.equal(torch.cat(model.sequence_logprobs(SEQUENCES)), base)


def test_only_the_named_modules_are_adapted(tmp_path: Path, tiny_model: Path) -> None:
    model = build_model(tmp_path, tiny_model, target_modules=("v_proj", "q_proj"))
    assert model.target_modules == ("q_proj", "v_proj")
    assert {name.split(".")[-3] for name in model.parameters} == {"q_proj", "v_proj"}
    assert not any(
        value.requires_grad for name, value in model._peft.named_parameters() if "lora_" not in name
    )
    with pytest.raises(ConfigError, match=r"the base has no \['w_proj'\]; it has \['down_proj'"):
        build_model(tmp_path, tiny_model, target_modules=("w_proj", "q_proj"))


def test_dropout_is_on_in_training_alone(tmp_path: Path, tiny_model: Path) -> None:
    model = build_model(tmp_path, tiny_model, lora_dropout=0.5)
    move(model)
    assert torch.equal(figures(model), figures(model))
    with torch.no_grad():
        first = torch.cat(model.sequence_logprobs(SEQUENCES))
        second = torch.cat(model.sequence_logprobs(SEQUENCES))
    assert not torch.equal(first, second)


def test_a_warm_start_goes_on_from_an_adapter_of_the_same_shape(
    tmp_path: Path, tiny_model: Path
) -> None:
    first = build_model(tmp_path, tiny_model)
    move(first)
    first.save_adapter(tmp_path / "first")
    second = build_model(tmp_path, tiny_model, warm_start=tmp_path / "first", seed=9)
    assert torch.equal(figures(second), figures(first))
    for change, said in (
        ({"r": 8}, "its r is 4, this job's is 8"),
        ({"lora_alpha": 4}, "its lora_alpha is 8"),
        ({"target_modules": ("q_proj",)}, "is on one side only"),
        ({"warm_start": tmp_path / "none"}, "holds no adapter"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_model(tmp_path, tiny_model, **{"warm_start": tmp_path / "first", **change})


def test_answers_end_where_generation_and_tokenizer_say(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "generation_config.json"
    declared = json.loads(file.read_text())
    file.write_text(json.dumps({**declared, "eos_token_id": [0, 5]}))
    assert build_model(tmp_path, folder).end_token_ids == (0, 5, 2)


def test_a_missing_base_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no directory '.*nowhere'"):
        build_model(tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no model to load"):
        build_model(tmp_path, tmp_path / "empty")
