"""Random LoRA adapters for a small Llama-like model, made without torch.

Their weights mean nothing; they are large enough that the adapted model's figures lie whole nats
from the base's.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TARGET_MODULES = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def build_tiny_adapter(model: Path, folder: Path, *, seed: int, rank: int = 8) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the model in `model`.

    Same model, seed and rank: same bytes. Returns `folder`, which is made where it is missing.
    """
    config = json.loads((model / "config.json").read_text())
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (d_in, d_out) in _linear_shapes(config).items():
            block = "self_attn" if module in {"q_proj", "k_proj", "v_proj", "o_proj"} else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{module}"
            a = random.standard_normal((rank, d_in)) / np.sqrt(d_in)
            b = random.standard_normal((d_out, rank))
            tensors[f"{stem}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_adapter_config(rank), sort_keys=True))
    return folder


def _adapter_config(rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(TARGET_MODULES),
        "bias": "none",
        "inference_mode": True,
    }


def _linear_shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """`(in, out)` features of each linear module in one layer."""
    hidden, inner, heads = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
    )
    head = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads", heads) * head
    return {
        "q_proj": (hidden, heads * head),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (heads * head, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
