"""Requests in threads that nobody waits for once the evaluation has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R], items: Sequence[T], threads: int, report: Callable[[int], None]
) -> list[R]:
    """`function` of every item, in order. `report` is called a few times a second and may raise.

    The threads are daemons, so that a worker told to stop need not wait for answers that nobody
    will read.
    """
    todo: SimpleQueue[tuple[int, T]] = SimpleQueue()
    done: SimpleQueue[tuple[int, R | Exception]] = SimpleQueue()
    for entry in enumerate(items):
        todo.put(entry)

    def work() -> None:
        while True:
            try:
                index, item = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((index, function(item)))
            except Exception as error:
                done.put((index, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, name="evaluation", daemon=True).start()
    results: dict[int, R] = {}
    try:
        while len(results) < len(items):
            report(len(results))
            try:
                index, result = done.get(timeout=0.25)
            except Empty:
                continue
            if isinstance(result, Exception):
                raise result
            results[index] = result
    finally:
        while not todo.empty():  # whatever ends this early also ends what hasn't begun
            try:
                todo.get_nowait()
            except Empty:
                break
    return [results[index] for index in range(len(items))]
