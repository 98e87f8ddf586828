"""Promote and roll back a hundred times while sixteen clients stream.

`python -P benchmarks/promotion_under_load.py [--flips 100] [--clients 16]`

Runs against a service that has two releases to move between (after `make demo`: `assistant@0` and
`assistant@1`). First each release, pinned, answers every question greedily, sixteen at a time; then
the clients ask the deployment by its public name while its production is promoted and rolled back
in turn. Every streamed answer must be whole, carry one release in all of its events, say what that
release says, and stand in the record under that release.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from server.cli.api import Api, connect

DEPLOYMENT = "assistant"
QUESTIONS = [
    "What is a river?",
    "How do I clean a window?",
    "Why do stars twinkle?",
    "What is a library?",
    "Explain what a password manager does.",
    "What is jazz?",
    "How do fish breathe?",
    "What is a map for?",
]
MAX_TOKENS = 24


@dataclass
class Streamed:
    """One answer as a client saw it."""

    id: str = ""
    models: set[str] = field(default_factory=set)
    text: str = ""
    finished: bool = False
    error: str | None = None
    seconds: float = 0.0


def stream(http: httpx.Client, model: str, question: str) -> Streamed:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
    }
    seen, began = Streamed(), time.perf_counter()
    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                seen.error = f"{reply.status_code} {reply.read().decode()[:200]}"
                return seen
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    seen.finished = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        seen.error = event["error"]["message"]
                        continue
                    seen.id = event["id"]
                    seen.models.add(event["model"])
                    for choice in event["choices"]:
                        seen.text += choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.seconds = time.perf_counter() - began
    return seen


def clients_of(api: Api, count: int) -> list[httpx.Client]:
    headers = {"authorization": f"Bearer {api.key}"}
    return [
        httpx.Client(base_url=api.url, headers=headers, timeout=300, trust_env=False)
        for _ in range(count)
    ]


def expected_answers(
    clients: list[httpx.Client], releases: tuple[str, str]
) -> dict[tuple[str, str], set[str]]:
    """What each release says to each question: asked twice, in company, as later."""
    known: dict[tuple[str, str], set[str]] = {}
    asked = [(release, question) for release in releases for question in QUESTIONS] * 2
    with ThreadPoolExecutor(len(clients)) as pool:
        answers = pool.map(
            lambda item: stream(clients[item[0] % len(clients)], *item[1]), enumerate(asked)
        )
        for item, answer in zip(asked, answers, strict=True):
            if answer.error is not None:
                raise SystemExit(f"{item[0]} does not answer: {answer.error}")
            known.setdefault(item, set()).add(answer.text)
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--other", help="the release to move to; by default the newest candidate")
    options = parser.parse_args()
    with connect() as api:
        first = api.get(f"/admin/deployments/{DEPLOYMENT}")["production"]
        other = options.other or next(
            release["name"]
            for release in api.pages("/admin/releases", deployment=DEPLOYMENT)
            if release["name"] != first and release["state"] == "candidate"
        )
        clients = clients_of(api, options.clients)
        api.post(
            f"/admin/deployments/{DEPLOYMENT}/promote",
            {"release": other, "force": True, "note": "load test"},
        )
        known = expected_answers(clients, (first, other))
        answers: list[tuple[str, Streamed]] = []
        ended = threading.Event()

        def keep_asking(number: int) -> None:
            turn = number
            while not ended.is_set():
                question = QUESTIONS[turn % len(QUESTIONS)]
                answers.append((question, stream(clients[number], DEPLOYMENT, question)))
                turn += 1

        moves: list[float] = []
        with ThreadPoolExecutor(options.clients) as pool:
            for number in range(options.clients):
                pool.submit(keep_asking, number)
            for flip in range(options.flips):
                # The pace of the flips: answers must run between them.
                time.sleep(0.5)
                began = time.perf_counter()
                if flip % 2 == 0:
                    api.post(f"/admin/deployments/{DEPLOYMENT}/rollback", {"note": "load test"})
                else:
                    body = {"release": other, "force": True, "note": "load test"}
                    api.post(f"/admin/deployments/{DEPLOYMENT}/promote", body)
                moves.append(time.perf_counter() - began)
            ended.set()
        failed = report(api, answers, known, moves, options.clients)
    raise SystemExit(1 if failed else 0)


def report(
    api: Api,
    answers: list[tuple[str, Streamed]],
    known: dict[tuple[str, str], set[str]],
    moves: list[float],
    clients: int,
) -> bool:
    """Print the table; True where a promise was broken."""
    found: Counter[str] = Counter()
    releases: Counter[str] = Counter()
    for question, answer in answers:
        if answer.error is not None or not answer.finished:
            found["failed"] += 1
            sys.stdout.write(f"failed: {answer.error or 'the stream ended early'}\n")
            continue
        if len(answer.models) != 1:
            found["more than one release in the events"] += 1
        release = next(iter(answer.models))
        releases[release] += 1
        if answer.text not in known[release, question]:
            found["text of another release"] += any(
                answer.text in texts for (name, _), texts in known.items() if name != release
            )
            found["text that neither said alone"] += 1
        if api.get(f"/v1/chat/completions/{answer.id}")["model"] != release:
            found["recorded under another release"] += 1
    rows = {
        "flips": len(moves),
        "clients, streaming": clients,
        "answers": len(answers),
        **{f"  by {name}": count for name, count in sorted(releases.items())},
        "failed requests": found["failed"],
        "answers with more than one release": found["more than one release in the events"],
        "answers with the text of the other release": found["text of another release"],
        "answers whose greedy text differs from a quiet run": found["text that neither said alone"],
        "rows under another release than the client saw": found["recorded under another release"],
        "move, median ms": f"{statistics.median(moves) * 1000:.0f}",
        "move, slowest ms": f"{max(moves) * 1000:.0f}",
    }
    sys.stdout.write("| what | count |\n|---|---|\n")
    sys.stdout.writelines(f"| {name} | {value} |\n" for name, value in rows.items())
    broken = found.copy()
    del broken["text that neither said alone"]
    return any(broken.values())


if __name__ == "__main__":
    main()
