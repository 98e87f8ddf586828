"""How fast the trainer is, beside TRL's `SFTTrainer` on the same rows.

`python -P benchmarks/training.py --model DIRECTORY [--rows N]`

One epoch over N short questions with one-sentence answers, adapters of rank 16 on all linear
layers, eight examples a step, float32. Each trainer runs in a process of its own; TRL runs twice,
as it is and in the trainer's environment. Prints a Markdown table of tokens/s, prompt and
completion together, and of the ratio to the first row. Model loading doesn't count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tuner.training.config import TrainingConfig, trainer_environment

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 8
_SUBJECTS = ("bridge", "compass", "volcano", "library", "glacier", "lantern", "harbour", "orchard")
_QUESTIONS = {
    "What is a {}?": "A {} is something that most people know by name and few could describe.",
    "Why would somebody need a {}?": "Somebody may need a {} when there is no simpler way.",
    "Describe a {} to a child.": "A {} is a thing you will remember once you have seen it.",
    "Who looks after a {}?": "Usually the people who live near a {} look after it.",
    "When was the first {} made?": "Nobody wrote down when the first {} came to be.",
    "Tell me something odd about a {}.": "The oddest thing about a {} is how often it is ignored.",
}


def build_rows(count: int) -> list[dict[str, Any]]:
    """Questions and answers, in TRL's conversational form."""
    texts = [
        (question.format(subject), answer.format(subject))
        for question, answer in _QUESTIONS.items()
        for subject in _SUBJECTS
    ]
    return [
        {
            "prompt": [{"role": "user", "content": texts[index % len(texts)][0]}],
            "completion": [{"role": "assistant", "content": texts[index % len(texts)][1]}],
        }
        for index in range(count)
    ]


def run_ours(model: Path, folder: Path, threads: int) -> tuple[int, float]:
    """Tokens of one epoch, and the seconds from the first step to the last."""
    from tuner.training.loop import train

    config = TrainingConfig(
        job_id="benchmark",
        method="supervised",
        base_path=model,
        base_name="benchmark",
        base_revision="benchmark",
        train_files=(folder / "rows.jsonl",),
        output_dir=folder / "out",
        references_dir=folder / "references",
        epochs=1,
        batch_size=BATCH_SIZE,
        validation_share=0,
        threads=threads,
    )
    tokens, times = 0, []

    def note(event: dict[str, Any]) -> None:
        nonlocal tokens
        if event["event"] in ("started", "step"):
            times.append(time.perf_counter())
        tokens = event.get("tokens", tokens)

    train(config, note)
    return tokens, times[-1] - times[0]


def run_trl(model: Path, folder: Path, threads: int) -> tuple[int, float]:
    """The same with TRL."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Without types of their own.
    datasets: Any = importlib.import_module("datasets")
    trl: Any = importlib.import_module("trl")
    torch.set_num_threads(threads)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=2e-4,
            completion_only_loss=True,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    started = time.perf_counter()
    trainer.train()
    return tokens, time.perf_counter() - started


def main() -> None:
    """Run each trainer in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--run", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run = run_ours if options.run == "ours" else run_trl
        tokens, seconds = run(options.model, options.folder, options.threads)
        print(json.dumps({"tokens": tokens, "seconds": seconds}))
        return

    tuned = trainer_environment(options.threads)
    kept = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    plain = {key: tuned[key] for key in kept}
    runs = {
        "this trainer": ("ours", tuned),
        "TRL, in this trainer's environment": ("trl", tuned),
        "TRL, as it is": ("trl", plain),
    }
    print("| trainer | tokens | seconds | tokens/s | ratio |\n|---|---|---|---|---|")
    first: float | None = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = build_rows(options.rows)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, (kind, environment) in runs.items():
            command = [sys.executable, "-P", str(Path(__file__).resolve()), "--run", kind]
            command += ["--model", str(options.model), "--folder", str(folder)]
            command += ["--threads", str(options.threads)]
            output = subprocess.run(
                command,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            ).stdout
            found = json.loads(output.splitlines()[-1])
            speed = found["tokens"] / found["seconds"]
            first = first or speed
            print(
                f"| {name} | {found['tokens']} | {found['seconds']:.1f} | {speed:.0f} "
                f"| {speed / first:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
