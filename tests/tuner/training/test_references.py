"""Reference values are computed once, whatever happens to the process or the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tuner.training.runs import example
from tuner.training.references import LogProbs, References
from tuner.training.rendering import RenderedExample

PAIR = example((5, 6), (7, 2), (8, 9, 2))


class Base:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, asked: RenderedExample) -> LogProbs:
        self.asked += 1
        return tuple(
            np.array([-token / 7 for token in completion], dtype=np.float32)
            for completion in asked.completions
        )


def references(folder: Path, base: Base, **changes: str) -> References:
    key = {"base_revision": "r1", "template_hash": "t1", "dtype": "float32", **changes}
    return References(folder, **key, compute=base)


def test_values_are_computed_once(tmp_path: Path) -> None:
    base = Base()
    first = references(tmp_path, base).get(PAIR)
    cache = references(tmp_path, base)
    again = cache.get(PAIR)
    assert base.asked == 1
    assert cache.missing([PAIR]) == []
    assert [value.tobytes() for value in again] == [value.tobytes() for value in first]


@pytest.mark.parametrize("change", ["base_revision", "template_hash", "dtype"])
def test_another_base_template_or_dtype_has_its_own_values(tmp_path: Path, change: str) -> None:
    base = Base()
    references(tmp_path, base).get(PAIR)
    references(tmp_path, base, **{change: "other"}).get(PAIR)
    assert base.asked == 2


def test_a_kill_in_the_middle_of_a_write_leaves_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base()

    def killed(file: Path, content: bytes) -> int:
        with file.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            references(tmp_path, base).get(PAIR)
    cache = references(tmp_path, base)
    assert cache.missing([PAIR]) == [PAIR]
    cache.get(PAIR)
    assert cache.missing([PAIR]) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_values_are_computed_anew(tmp_path: Path, damage: str) -> None:
    base = Base()
    expected = references(tmp_path, base).get(PAIR)
    (file,) = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    changed = {
        "cut": content[:-5],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
    }
    file.write_bytes(changed[damage])
    for _ in range(2):
        found = references(tmp_path, base).get(PAIR)
        assert [value.tobytes() for value in found] == [value.tobytes() for value in expected]
    assert base.asked == 2
