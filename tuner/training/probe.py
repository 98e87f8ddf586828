"""Reference log-probabilities by which an engine is proven to answer with these weights.

Owns: the choice of the texts and their figures here. Does not own: the engine's figures and the
judgement (`server/engines/proof.py`). The texts are few and short, because every engine reads them
each time it loads the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuner.training.model import TunedModel
from tuner.training.rendering import RenderedExample, Renderer

MAX_TOKENS = 64

_FIXED = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Explain why the sky is blue.", "Sure! The sky is blue because of the way that light"),
    ("Write a greeting to a colleague.", "Hello! I hope this message finds you well."),
)
_FROM_TRAINING = 3
# Of a long example: the end of its prompt, and the beginning of its answer, where an adapter shows.
_PROMPT_TOKENS = 32


def build_probe(
    model: TunedModel, renderer: Renderer, examples: Sequence[RenderedExample]
) -> dict[str, Any]:
    """Token ids, and the log-probability of each token but the first under base and adapter.

    `prompts`: lists of token ids; `base`, `adapter`: one list of nats for each. Three fixed texts
    show that the base is the same; the three shortest of `examples` show the adapter's effect most.
    """
    prompts = choose_prompts(model, renderer, examples)
    with model.base_only():
        base = _figures(model, prompts)
    with model.evaluating():
        adapter = _figures(model, prompts)
    return {
        "prompts": [list(prompt) for prompt in prompts],
        "base": base,
        "adapter": adapter,
        "dtype": model.dtype_name,
    }


def choose_prompts(
    model: TunedModel, renderer: Renderer, examples: Sequence[RenderedExample]
) -> list[tuple[int, ...]]:
    """The texts as token ids, at most `MAX_TOKENS` each."""
    fixed = [
        (
            *renderer.render_prompt([{"role": "user", "content": question}]),
            *model.tokenizer.encode(answer, add_special_tokens=False),
        )[-MAX_TOKENS:]
        for question, answer in _FIXED
    ]
    shortest = sorted(examples, key=lambda example: (example.tokens, example.content_hash))
    trained = [
        (*example.prompt[-_PROMPT_TOKENS:], *example.completions[0])[:MAX_TOKENS]
        for example in shortest[:_FROM_TRAINING]
    ]
    return list(dict.fromkeys(fixed + trained))


def _figures(model: TunedModel, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
    # One pass a text, as an engine reads them.
    return [model.sequence_logprobs([(prompt[:1], prompt[1:])])[0].tolist() for prompt in prompts]
