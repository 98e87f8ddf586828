"""What a base model's files tell, and what happens when they don't."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tuner.base_models import (
    MARK,
    BaseModelError,
    content_revision,
    describe_base,
    read_chat_template,
    template_hash,
)

CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": 512,
    "vocab_size": 300,
    "eos_token_id": 2,
}


def write_model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tensors = {
        "model.embed_tokens.weight": np.zeros((300, 8), np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32),
        "model.layers.0.self_attn.q_proj.bias": np.zeros(8, np.float32),
        "model.layers.0.mlp.down_proj.weight": np.zeros((8, 16), np.float16),
        "model.layers.0.input_layernorm.weight": np.ones(8, np.float32),
        "lm_head.weight": np.zeros((300, 8), np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


def test_a_model_is_described_from_its_files(model: Path) -> None:
    base = describe_base(model, "tiny")
    assert (base.name, base.architecture, base.max_position_embeddings) == ("tiny", "llama", 512)
    assert base.eos_token_ids == (2,)
    assert base.template_hash == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert base.revision == content_revision(model)


def test_only_linear_layers_can_carry_an_adapter(model: Path) -> None:
    assert describe_base(model, "tiny").linear_modules == {
        "model.layers.0.self_attn.q_proj": (8, 8),
        "model.layers.0.mlp.down_proj": (8, 16),
    }


def test_generation_config_has_the_last_word_on_where_an_answer_ends(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert describe_base(model, "tiny").eos_token_ids == (2, 7)
    (model / "generation_config.json").write_text("{}")  # which an engine reads alone
    assert describe_base(model, "tiny").eos_token_ids == ()


def test_limits_of_a_nested_text_model_are_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "nested", text_config={**CONFIG, "max_position_embeddings": 64})
    assert describe_base(folder, "nested").max_position_embeddings == 64


def test_the_revision_follows_content_and_not_place_time_or_library(
    model: Path, tmp_path: Path
) -> None:
    first = content_revision(model)
    elsewhere = write_model(tmp_path / "copy", transformers_version="6.0")
    assert content_revision(elsewhere) == first
    write_model(elsewhere, rope_theta=5.0)
    assert content_revision(elsewhere) != first


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"]
)
def test_the_revision_follows_whatever_renders_and_reads_a_prompt(model: Path, name: str) -> None:
    first = content_revision(model)
    (model / name).write_text('{"changed": true}')
    assert content_revision(model) != first


def test_a_template_that_was_changed_in_place_is_refused(model: Path) -> None:
    mark = {"revision": "marked", "template_hash": template_hash("{{ messages }}")}
    (model / MARK).write_text(json.dumps(mark))
    assert describe_base(model, "tiny").revision == "marked"
    (model / "chat_template.jinja").write_text("{{ messages[0] }}")
    with pytest.raises(BaseModelError, match="was changed in place"):
        describe_base(model, "tiny")


@pytest.mark.parametrize(
    "stray", ["consolidated.safetensors", "other.safetensors", "pytorch_model.bin", "params.json"]
)
def test_weights_that_an_engine_may_take_instead_are_refused(model: Path, stray: str) -> None:
    (model / stray).write_bytes((model / "model.safetensors").read_bytes())
    with pytest.raises(BaseModelError, match=stray):
        describe_base(model, "tiny")


def test_the_files_of_an_index_are_one_model(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    describe_base(model, "tiny")
    (model / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(BaseModelError, match="lacks model-00001"):
        describe_base(model, "tiny")


def test_control_tokens_are_read_wherever_a_tokenizer_keeps_them(model: Path) -> None:
    (model / "chat_template.jinja").write_text("<|assistant|> <think> {{ messages }}")
    added = [
        {"id": 7, "content": "<|eot|>", "special": True},
        {"id": 8, "content": "<think>", "special": False},
        {"id": 9, "content": "<table>", "special": False},
    ]
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<|eot|>",
        "added_tokens_decoder": {"5": {"content": "<|fim|>", "special": True}},
        "additional_special_tokens": ["<|more|>"],
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    base = describe_base(model, "tiny")
    assert set(base.control_tokens.everywhere) == {
        "<|eot|>", "<s>", "<|fim|>", "<|more|>", "<|assistant|>",
    }  # fmt: skip
    assert base.control_tokens.markup == ("<think>",)
    assert base.eos_token_ids == (2, 7)  # an engine ends at the tokenizer's own too


def test_a_given_revision_goes_before_the_mark_and_the_mark_before_content(model: Path) -> None:
    (model / MARK).write_text('{"revision": "marked"}')
    assert describe_base(model, "tiny").revision == "marked"
    assert describe_base(model, "tiny", "main-1234").revision == "main-1234"


def test_a_kept_revision_holds_until_a_file_changes(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "made" / "revisions.json"
    first = content_revision(model, cache=cache)
    kept = json.loads(cache.read_text())
    kept[str(model.resolve())]["revision"] = "from the cache"
    cache.write_text(json.dumps(kept))
    assert content_revision(model, cache=cache) == "from the cache"
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert content_revision(model, cache=cache) == first
    cache.write_text("torn")
    assert content_revision(model, cache=cache) == first


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"chat_template": "A"}, "A"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "T"},
                    {"name": "default", "template": "D"},
                ]
            },
            "D",
        ),
    ],
)
def test_older_places_of_a_chat_template_are_known(
    model: Path, content: dict[str, Any], expected: str
) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps(content))
    assert read_chat_template(model) == expected
    assert describe_base(model, "tiny").template_hash == template_hash(expected)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", r"config\.json' is missing"),
        ("chat_template.jinja", r"no chat template; set model\.path to .* chat_template\.jinja"),
        ("model.safetensors", r"no \*\.safetensors"),
    ],
)
def test_what_is_missing_is_named(model: Path, missing: str, said: str) -> None:
    (model / missing).unlink()
    with pytest.raises(BaseModelError, match=said):
        describe_base(model, "tiny")


def test_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no model at"):
        describe_base(tmp_path / "nowhere", "tiny")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", (3).to_bytes(8, "little") + b"abc"])
def test_a_broken_weights_file_is_named(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match="no safetensors file"):
        describe_base(model, "tiny")


def test_a_configuration_of_something_else_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "vae")
    (folder / "config.json").write_text('{"latent_channels": 4}')
    with pytest.raises(BaseModelError, match="lacks 'model_type'"):
        describe_base(folder, "vae")
