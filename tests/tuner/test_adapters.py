"""What an adapter must be to be stored, loaded or promoted, and what the store keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.engine_fixtures import TINY_SHAPE
from tests.tiny_adapters import TARGET_MODULES, build_tiny_adapter
from tuner.adapter_checks import check_adapter
from tuner.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFacts,
    AdapterRefused,
    AdapterStore,
    adapter_id,
    build_adapter_config,
    content_hash,
)

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPES = {
    "q_proj": (128, 128),
    "k_proj": (64, 128),
    "v_proj": (64, 128),
    "o_proj": (128, 128),
    "gate_proj": (256, 128),
    "up_proj": (256, 128),
    "down_proj": (128, 256),
}
BASE_SHAPES = {
    f"model.layers.{layer}.{'mlp' if name.split('_')[0] in ('gate', 'up', 'down') else 'self_attn'}"
    f".{name}": shape
    for layer in range(2)
    for name, shape in SHAPES.items()
}

Change = Callable[[Path], None]


def make(folder: Path, *, seed: int = 1, rank: int = 8) -> Path:
    """An adapter as the trainer writes it, in a folder of its own."""
    model = folder.parent / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(TINY_SHAPE))
    build_tiny_adapter(model, folder, seed=seed, rank=rank)
    (folder / CONFIG_FILE).write_bytes(
        build_adapter_config(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=TARGET_MODULES,
            base_name="tiny",
            base_revision="rev-1",
        )
    )
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make(tmp_path / "adapter")


def check(folder: Path, **options: Any) -> AdapterFacts:
    return check_adapter(
        folder,
        **{
            "base_name": "tiny",
            "base_revision": "rev-1",
            "max_rank": 16,
            "target_modules": frozenset(SHAPES),
            "shapes": BASE_SHAPES,
            **options,
        },
    )


def test_a_good_adapter_is_described(adapter: Path) -> None:
    facts = check(adapter)
    assert facts.content_hash == content_hash(adapter)
    assert (facts.r, facts.lora_alpha, facts.dtype) == (8, 16.0, "float32")
    assert facts.target_modules == TARGET_MODULES
    assert facts.parameters == 2 * sum(8 * (out + into) for out, into in SHAPES.values())
    assert facts.size_bytes == sum(file.stat().st_size for file in adapter.iterdir())


def set_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))

    return change


def set_tensors(**changes: Any) -> Change:
    """Change tensors: name to a function of the present one (None removes it)."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        for name, function in changes.items():
            made = function(tensors.pop(name, None))
            if made is not None:
                tensors[name] = made
        save_file(tensors, folder / WEIGHTS_FILE)

    return change


def each_tensor(function: Callable[[str, Any], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        save_file({n: function(n, t) for n, t in tensors.items()}, folder / WEIGHTS_FILE)

    return change


def put(value: float) -> Callable[[Any], Any]:
    def function(tensor: Any) -> Any:
        tensor[0, 0] = value
        return tensor

    return function


def write(name: str, content: bytes = b"x") -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def link(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS_FILE).symlink_to(folder.parent / "elsewhere")


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size - 100)


A, B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"
REFUSALS: list[tuple[str, Change]] = [
    ("symlink", link),
    ("pickle", write("adapter_model.bin")),
    ("pickle", write("training_args.PT")),
    ("extra_file", write("README.md")),
    ("extra_file", lambda folder: (folder / "checkpoints").mkdir()),
    ("missing_file", remove(CONFIG_FILE)),
    ("missing_file", remove(WEIGHTS_FILE)),
    ("oversized", write(CONFIG_FILE, b" " * 65_537)),
    ("bad_config", write(CONFIG_FILE, b"{")),
    ("bad_config", write(CONFIG_FILE, b"[" * 60_000)),
    ("bad_config", write(CONFIG_FILE, b"\xff")),
    ("bad_config", write(CONFIG_FILE, b"[]")),
    ("bad_config", set_config(lora_alpha=None)),
    ("bad_config", set_config(lora_alpha=True)),
    ("bad_config", set_config(lora_alpha=float("nan"))),
    ("bad_config", set_config(lora_alpha=0)),
    ("wrong_base", set_config(base_model_name_or_path="other")),
    ("wrong_base", set_config(revision="rev-2")),
    ("modules_to_save", set_config(modules_to_save=["lm_head"])),
    ("dora", set_config(use_dora=True)),
    ("dora", set_tensors(**{f"{Q_PROJ}.lora_magnitude_vector": lambda _: np.ones(3, "f4")})),
    ("bias", set_config(bias="all")),
    ("bias", set_config(lora_bias=True)),
    ("bias", set_tensors(**{f"{Q_PROJ}.lora_B.bias": lambda _: np.ones(3, "f4")})),
    ("init", set_config(init_lora_weights="pissa_niter_4")),
    ("unsupported", set_config(peft_type="IA3")),
    ("unsupported", set_config(task_type="SEQ_CLS")),
    ("unsupported", set_config(use_rslora=True)),
    ("unsupported", set_config(rank_pattern={"q_proj": 4})),
    ("unsupported", set_config(something_of_tomorrow=1)),
    ("wrong_rank", set_config(r=17)),
    ("wrong_rank", set_config(r=4)),
    ("wrong_rank", set_config(r="8")),
    ("wrong_rank", set_config(r=True)),
    ("wrong_rank", set_tensors(**{A: lambda tensor: tensor[:4].copy()})),
    ("wrong_modules", set_config(target_modules="all-linear")),
    ("wrong_modules", set_config(target_modules=[*TARGET_MODULES, "lm_head"])),
    ("wrong_modules", set_config(target_modules=["q_proj"])),
    ("wrong_modules", set_tensors(**{B: lambda _: None})),
    ("wrong_modules", set_tensors(**{"model.embed_tokens.weight": lambda _: np.ones(3, "f4")})),
    (
        "wrong_modules",
        set_tensors(
            **{
                f"{Q_PROJ.replace('layers.0', 'layers.9')}.lora_{side}.weight": function
                for side, function in (
                    ("A", lambda _: np.ones((8, 128), "f4")),
                    ("B", lambda _: np.ones((128, 8), "f4")),
                )
            }
        ),
    ),
    ("wrong_shape", set_tensors(**{A: lambda tensor: tensor[:, :64].copy()})),
    ("wrong_shape", set_tensors(**{B: lambda tensor: tensor.reshape(-1)})),
    ("truncated", cut),
    ("truncated", write(WEIGHTS_FILE, b"\xff" * 64)),
    ("truncated", write(WEIGHTS_FILE, b"")),
    ("wrong_dtype", set_tensors(**{A: lambda tensor: tensor.astype("f8")})),
    ("wrong_dtype", set_tensors(**{A: lambda tensor: tensor.astype("f2")})),
    ("not_finite", set_tensors(**{A: put(float("nan"))})),
    ("not_finite", set_tensors(**{B: put(float("-inf"))})),
    ("all_zero", each_tensor(lambda name, t: t * 0 if "lora_B" in name else t)),
    ("all_zero", each_tensor(lambda name, t: t * -0.0 if "lora_B" in name else t)),
]


@pytest.mark.parametrize(
    ("code", "change"), REFUSALS, ids=[f"{code}-{n}" for n, (code, _) in enumerate(REFUSALS)]
)
def test_each_fault_is_refused_with_its_own_code(adapter: Path, code: str, change: Change) -> None:
    check(adapter)
    change(adapter)
    with pytest.raises(AdapterRefused) as refused:
        check(adapter)
    assert refused.value.code == code
    assert refused.value.message


def test_a_folder_that_is_a_link_or_none_is_refused(adapter: Path) -> None:
    link = adapter.parent / "link"
    link.symlink_to(adapter)
    for folder, code in ((link, "symlink"), (adapter.parent / "nowhere", "missing_file")):
        with pytest.raises(AdapterRefused) as refused:
            check(folder)
        assert refused.value.code == code


def test_too_many_bytes_are_refused_before_they_are_read(adapter: Path) -> None:
    with pytest.raises(AdapterRefused, match="at most 1000") as refused:
        check(adapter, max_bytes=1000)
    assert refused.value.code == "oversized"


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_halves_are_read_as_well(adapter: Path, dtype: str) -> None:
    each_tensor(lambda _, tensor: tensor.astype(dtype))(adapter)
    assert check(adapter).dtype == {"f2": "float16", "f4": "float32"}[dtype]


def test_a_base_whose_layers_are_unknown_is_checked_without_them(adapter: Path) -> None:
    set_tensors(**{A: lambda tensor: tensor[:, :64].copy()})(adapter)
    assert check(adapter, shapes=None, target_modules=None).r == 8


def test_the_name_follows_content_alone(tmp_path: Path) -> None:
    one, same = make(tmp_path / "one"), make(tmp_path / "same")
    os.utime(same / WEIGHTS_FILE, ns=(1, 1))
    assert content_hash(one) == content_hash(same)
    assert adapter_id(content_hash(one)) == "ad_" + content_hash(one)[:24]
    assert content_hash(make(tmp_path / "other", seed=2)) != content_hash(one)
    set_config(lora_alpha=17)(same)
    assert content_hash(one) != content_hash(same)


def test_the_configuration_is_the_same_bytes_whatever_the_order() -> None:
    config = build_adapter_config(
        r=8, lora_alpha=16.0, target_modules={"v", "q"}, base_name="tiny", base_revision=None
    )
    again = build_adapter_config(
        r=8, lora_alpha=16, target_modules=["q", "v", "q"], base_name="tiny", base_revision=None
    )
    assert config == again
    assert list(json.loads(config)) == sorted(json.loads(config))


def test_the_store_keeps_what_it_was_given(adapter: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    stored = store.put(adapter)
    assert stored == content_hash(adapter) == store.put(adapter)
    assert [entry.name for entry in store.root.iterdir()] == [stored]
    assert {file.name for file in store.path(stored).iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    store.verify(stored)


def test_damage_in_the_store_is_found_and_mended(adapter: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    stored = store.put(adapter)
    cut(store.path(stored))
    with pytest.raises(AdapterRefused) as refused:
        store.verify(stored)
    assert refused.value.code == "damaged"
    (store.path(stored) / CONFIG_FILE).unlink()
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json") as refused:
        store.verify(stored)
    assert refused.value.code == "missing_file"
    assert store.put(adapter) == stored
    store.verify(stored)


def test_an_adapter_that_cannot_be_read_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError):
        store.put(adapter)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_a_hash_names_a_folder_of_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no content hash"):
        AdapterStore(tmp_path).path(name)
