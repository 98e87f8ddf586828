"""A tiny chat model with random weights, which a test makes in a second and vLLM serves.

Shaped like SmolLM2 (Llama, grouped heads, tied embeddings, ChatML), with a byte-level tokenizer
without merges: one token per byte of UTF-8. Its answers mean nothing.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_SYSTEM = "Be brief."
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Further control tokens, of other families' templates (`chat_templates.py`).
MORE_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def build_tiny_model(
    folder: Path, *, seed: int = 0, layers: int = 2, sliding_window: int | None = None
) -> Path:
    """Write weights, configuration, tokenizer and chat template into `folder`.

    Same seed, same bytes. Hidden size 128, two heads of 64, one key-value head, 512 positions,
    vocabulary 320. With `sliding_window` (tokens) it is a Mistral whose attention reaches that far
    back.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[],
        model_max_length=512,
    )
    fast.add_tokens(list(MORE_SPECIAL_TOKENS), special_tokens=True)
    fast.add_tokens(list(MARKUP_TOKENS))
    fast.chat_template = CHAT_TEMPLATE

    shape = {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # Ten times the usual spread: the distributions are far from uniform and differ from context
        # to context.
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = (
        LlamaForCausalLM(LlamaConfig(**shape))
        if sliding_window is None
        else MistralForCausalLM(MistralConfig(**shape, sliding_window=sliding_window))
    )
    torch.random.set_rng_state(state)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
