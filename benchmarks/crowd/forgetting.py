"""What an adapter has cost elsewhere: a child of the learning benchmark, as it loads a model.

Reads one JSON object from standard input (`base`, `adapter` or null, `text`, `tokens`, `chats`) and
prints one: the negative log-likelihood of plain text in nats per token, of the base without an
adapter, and the divergence `KL(base ‖ tuned)` in nats per token over `chats`, pairs of messages
and the base's own answer. The text is read as it is, in pieces of 1024 tokens: no template and no
end token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PIECE = 1024


def text_nll(model: Any, pieces: list[list[int]]) -> float:
    """Mean negative log-likelihood of each token but a piece's first, in nats."""
    total, count = 0.0, 0
    for piece in pieces:
        ids = torch.tensor([piece])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(piece) - 1
    return total / count


def answer_logprobs(model: Any, chats: list[tuple[list[int], list[int]]]) -> Iterator[Tensor]:
    """Log-probabilities of the whole vocabulary at each token of each answer."""
    for prompt, answer in chats:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        yield logits[len(prompt) - 1 : -1].float().log_softmax(-1)


def measure(asked: dict[str, Any]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(asked["base"], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        asked["base"], dtype=torch.float32, local_files_only=True
    ).eval()
    ids = tokenizer.encode(asked["text"], add_special_tokens=False)[: asked["tokens"]]
    pieces = [ids[at : at + PIECE] for at in range(0, len(ids) - 1, PIECE)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    found: dict[str, Any] = {"tokens": len(ids)}
    if asked["adapter"] is None:
        return {**found, "base_nll": text_nll(model, pieces) if pieces else None}
    tuned = PeftModel.from_pretrained(model, Path(asked["adapter"])).eval()
    if pieces:
        found["nll"] = text_nll(tuned, pieces)
    chats = []
    for turns, answer in asked["chats"]:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        encoded = [tokenizer.encode(part, add_special_tokens=False) for part in (text, answer)]
        if encoded[1]:
            chats.append((encoded[0], encoded[1]))
    total, count = 0.0, 0
    for chat in chats:
        parts = []
        for context in (tuned.disable_adapter(), nullcontext()):
            with context:
                parts += list(answer_logprobs(tuned, [chat]))
        base, with_adapter = parts
        total += float((base.exp() * (base - with_adapter)).sum())
        count += len(base)
    return {**found, "kl": total / count if count else None}


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(measure(json.load(sys.stdin))))
