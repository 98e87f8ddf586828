"""`burnish demo`: the whole loop against a running service, through the public API alone.

One judge with one visible preference (an answer is one short sentence) rates and corrects answers
to some fifty questions; the service freezes, tunes, evaluates and promotes; and the same held-out
questions, never judged, are asked before and after. Everything that is measured is printed;
`--report` keeps every answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from server.cli.api import Api, ApiError
from server.cli.app import REFUSED, console, show_table
from server.cli.demo_prompts import HELD_OUT, JUDGED
from server.cli.watch import follow_evaluation, follow_tuning, freeze, progress_bar

DEPLOYMENT = "assistant"
MAX_TOKENS = 96
MAX_WORDS = 30
THREADS = 12
READY_SECONDS = 300.0

_SENTENCE_END = re.compile(r"[.!?…]+[\"')\]]*(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and what came of it."""

    prompt: str
    completion_id: str
    release: str
    text: str
    finished: bool  #: ended by itself, not by the length limit

    @property
    def is_liked(self) -> bool:
        return self.finished and is_one_short_sentence(self.text)


def is_one_short_sentence(text: str) -> bool:
    """The judge's preference: one line, one sentence, at most 30 words."""
    text = text.strip()
    if not text or "\n" in text or len(text.split()) > MAX_WORDS:
        return False
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return not ends or ends == [len(text)]


def repeated_ratio(text: str) -> float:
    """Share of word trigrams that occurred before, 0 to 1: what a ruined model does."""
    words = text.split()
    trigrams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def run_demo(api: Api, *, keep: bool, report: Path | None) -> int:
    """Run the loop; 0 when the candidate was promoted, 1 when a station refused."""
    began = time.monotonic()
    _wait_until_ready(api)
    deployment = api.get(f"/admin/deployments/{DEPLOYMENT}")
    origin, start = f"{DEPLOYMENT}@0", deployment["production"]
    _say(f"{DEPLOYMENT} is {start} on {deployment['base_model']}.")

    _say(f"1/6 Ask {len(HELD_OUT)} held-out questions of the untuned {origin}.")
    before = _ask_all(api, origin, HELD_OUT)
    _say(f"    {_share(before)} are answered in one short sentence.")

    _say(f"2/6 Chat, and judge {len(JUDGED)} answers by one rule: one short sentence.")
    judged = _ask_all(api, DEPLOYMENT, [prompt for prompt, _ in JUDGED])
    corrections = _judge_all(api, judged)
    liked = len(judged) - corrections
    _say(f"    {liked} thumbs up, {corrections} thumbs down with a better answer.")

    _say("3/6 Freeze the judgements into a data set.")
    dataset = freeze(api, DEPLOYMENT)
    if dataset["status"] == "failed":
        return _stop(f"no data set: {dataset['error']}")
    _say(f"    {dataset['id']}: {dataset['counts']}, left out {dataset['dropped'] or 'nothing'}.")

    _say("4/6 Tune an adapter on it.")
    try:
        job = api.post(
            "/v1/fine_tuning/jobs", {"model": DEPLOYMENT, "training_file": dataset["id"]}
        )
    except ApiError as error:
        return _stop(error.message)
    job = follow_tuning(api, job["id"])
    if job["status"] != "succeeded":
        return _stop(f"tuning {job['status']}: {(job.get('error') or {}).get('message')}")
    release = str(job["fine_tuned_model"])

    _say(f"5/6 Compare {release} with {start} on what neither has seen.")
    evaluation_id = api.get(f"/admin/jobs/{job['id']}")["result"]["evaluation_id"]
    evaluation = follow_evaluation(api, evaluation_id)
    for reason in evaluation["reasons"]:
        _say(f"    {reason}")
    if evaluation["decision"] != "pass":
        return _stop(f"the gate says {evaluation['decision'] or evaluation['error']}; not promoted")

    _say(f"6/6 Promote {release}, without a restart, and ask the held-out questions again.")
    moved = api.post(
        f"/admin/deployments/{DEPLOYMENT}/promote", {"release": release, "note": "demo"}
    )
    after = _ask_all(api, DEPLOYMENT, HELD_OUT)
    _compare(before, after)
    if not keep:
        moved = api.post(f"/admin/deployments/{DEPLOYMENT}/rollback", {"note": "demo"})
    seconds = time.monotonic() - began
    _say(
        f"Production is {moved['production']}, previous {moved['previous']}. {seconds:.0f} seconds."
    )
    _say(f"Where it comes from: burnish explain {release}.  Back again: burnish rollback.")
    if report is not None:
        _write_report(report, before, judged, after, dataset, job, evaluation, seconds)
    return 0


@contextmanager
def service() -> Iterator[None]:
    """A service for the demo: the running one, else one that is started for the block."""
    from server.processes.engine import answers_ok
    from server.processes.supervisor import local_url
    from server.settings import load_settings

    settings = load_settings()
    health = f"{local_url(settings)}/healthz"
    if "BURNISH_URL" in os.environ or answers_ok(health):
        yield
        return
    _say("No service runs here: starting one for the demo; it ends with it.")
    child = subprocess.Popen([sys.executable, "-P", "-m", "server.cli", "serve"])
    try:
        while not ((settings.data / "credentials").exists() and answers_ok(health)):
            try:
                code = child.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                continue
            raise SystemExit(f"burnish: the service ended with exit status {code}; see above")
        yield
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.wait()


def _wait_until_ready(api: Api) -> None:
    """A service that has just started loads for a minute."""
    until = time.monotonic() + READY_SECONDS
    with console.status("waiting until the engine answers"):
        while True:
            try:
                api.get("/readyz")
                return
            except ApiError as error:
                if error.status != 503 or time.monotonic() > until:
                    raise
                time.sleep(1.0)


def _ask(api: Api, model: str, prompt: str) -> Asked:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
    }
    reply = api.post("/v1/chat/completions", body)
    choice = reply["choices"][0]
    return Asked(
        prompt=prompt,
        completion_id=reply["id"],
        release=reply["model"],
        text=choice["message"]["content"] or "",
        finished=choice["finish_reason"] == "stop",
    )


def _ask_all(api: Api, model: str, prompts: Sequence[str]) -> list[Asked]:
    return _in_parallel(lambda prompt: _ask(api, model, prompt), prompts, "asking")


def _judge_all(api: Api, answers: Sequence[Asked]) -> int:
    """Thumb each answer, correct those that break the rule; the number of corrections."""
    better = dict(JUDGED)

    def judge(answer: Asked) -> int:
        about = {"completion_id": answer.completion_id}
        api.post("/v1/feedback", {**about, "kind": "rating", "value": answer.is_liked})
        if answer.is_liked:
            return 0
        api.post("/v1/feedback", {**about, "kind": "correction", "value": better[answer.prompt]})
        return 1

    return sum(_in_parallel(judge, answers, "judging"))


def _in_parallel(work: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
    """`work` of every item, in order, with a progress bar."""
    with progress_bar() as progress, ThreadPoolExecutor(THREADS) as pool:
        bar = progress.add_task(what, total=len(items), note="")
        futures = [pool.submit(work, item) for item in items]
        for _ in as_completed(futures):
            progress.advance(bar)
        return [future.result() for future in futures]


def _share(answers: Sequence[Asked]) -> str:
    return f"{mean(answer.is_liked for answer in answers):.0%}"


def _compare(before: Sequence[Asked], after: Sequence[Asked]) -> None:
    rows = [
        {
            "held-out questions": name,
            "one short sentence": _share(answers),
            "words": f"{mean(len(answer.text.split()) for answer in answers):.0f}",
            "empty": f"{mean(not answer.text.strip() for answer in answers):.0%}",
            "repetition": f"{mean(repeated_ratio(answer.text) for answer in answers):.0%}",
        }
        for name, answers in ((before[0].release, before), (after[0].release, after))
    ]
    show_table(rows, list(rows[0]), empty="")
    for old, new in list(zip(before, after, strict=True))[:5]:
        _say(f"  {old.prompt}")
        _say(f"    before  {_one_line(old.text)}")
        _say(f"    after   {_one_line(new.text)}")


def _one_line(text: str, width: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _write_report(
    path: Path,
    before: Sequence[Asked],
    judged: Sequence[Asked],
    after: Sequence[Asked],
    dataset: dict[str, Any],
    job: dict[str, Any],
    evaluation: dict[str, Any],
    seconds: float,
) -> None:
    asked = {"before": before, "judged": judged, "after": after}
    content: dict[str, Any] = {
        key: [{**asdict(answer), "liked": answer.is_liked} for answer in answers]
        for key, answers in asked.items()
    }
    content |= {"dataset": dataset, "job": job, "evaluation": evaluation, "seconds": seconds}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _say(f"All answers: {path}")


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _stop(reason: str) -> int:
    _say(f"Stopped: {reason}")
    return REFUSED
