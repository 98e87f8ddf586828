"""Promise 47: whatever people send is bounded before it is worked on.

Each corpus is a list of `Hostile` in `tests/promises/hostile`. Each input is answered or refused
within a second of the gateway's time and within 64 MiB, while others are answered as before.
"""

from __future__ import annotations

import itertools
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.promise_fixtures import Figures
from tests.promises.hostile import bodies, compressed, files, heads
from tests.promises.hostile.sending import Hostile, Target
from tests.promises.load import ask_at_rate, cpu_seconds, peak_mib, reset_peak, resident_mib
from tests.promises.processes import engine_process, gateway_process, prepare
from tests.promises.scale import is_full, scaled

pytestmark = pytest.mark.promises

CORPORA = {
    "bodies": bodies.CORPUS,
    "compressed": compressed.CORPUS,
    "files": files.CORPUS,
    "heads": heads.CORPUS,
}
MOST_SECONDS = 1.0
MOST_MIB = 64.0
ROUNDS = 5


@dataclass(frozen=True)
class Attacked:
    """A gateway in a process of its own."""

    target: Target
    pid: int


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    folder = tmp_path_factory.mktemp("attacked")
    place = prepare(folder)
    settings, key = place.settings, place.key("mallory", "admin")
    with (
        engine_process() as engine,
        gateway_process(
            settings.data, place.base.path, engine, folder / "log", **heads.PATIENCE
        ) as gateway,
    ):
        pid = int((settings.data / "burnish.gateway.lock").read_text())
        ask_at_rate(gateway.url, "assistant", key, requests=50)  # the first ones cost more
        yield Attacked(Target(gateway.url, key), pid)


@pytest.mark.parametrize("corpus", CORPORA)
def test_each_input_ends_in_bounded_time_and_memory(
    attacked: Attacked, corpus: str, figures: Figures
) -> None:
    slowest, largest = ("", 0.0), ("", 0.0)
    for hostile in CORPORA[corpus]:
        reset_peak(attacked.pid)
        before, worked = resident_mib(attacked.pid), cpu_seconds(attacked.pid)
        status = hostile.send(attacked.target)
        worked = cpu_seconds(attacked.pid) - worked
        grown = peak_mib(attacked.pid) - before
        assert status is None or status in hostile.statuses, (hostile.name, status)
        assert worked < MOST_SECONDS, (hostile.name, worked)
        assert grown < MOST_MIB, (hostile.name, grown)
        slowest = max(slowest, (hostile.name, worked), key=lambda found: found[1])
        largest = max(largest, (hostile.name, grown), key=lambda found: found[1])
    figures(
        inputs=len(CORPORA[corpus]),
        slowest_seconds=round(slowest[1], 2),
        slowest=slowest[0],
        largest_mib=round(largest[1], 1),
        largest=largest[0],
    )


def test_others_are_answered_meanwhile(attacked: Attacked, figures: Figures) -> None:
    asked = scaled(1_000)
    target = attacked.target

    def ask() -> float:
        run = ask_at_rate(target.url, "assistant", target.key, requests=asked)
        assert (run["ends"], run["failures"]) == (asked, 0)
        return float(run["p95_ms"])

    ratios = []
    inputs = itertools.cycle(h for corpus in CORPORA.values() for h in corpus)
    for _ in range(
        ROUNDS if is_full() else 1
    ):  # side by side: the machine is not the same from minute to minute
        alone = ask()
        with _attacking(target, inputs):
            beside = ask()
        ratios.append(2 * beside / (alone + ask()))
    ratio = statistics.median(ratios)
    figures(p95_ratio=round(ratio, 2))
    if is_full():  # a busy machine says nothing about it
        assert ratio <= 1.2


@contextmanager
def _attacking(target: Target, inputs: Iterator[Hostile]) -> Iterator[None]:
    """Send one hostile input after the other until the block ends, twice a second."""
    ended = threading.Event()

    def attack() -> None:
        while not ended.wait(0.5):
            next(inputs).send(target)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        yield
    finally:
        ended.set()
        attacker.join()
