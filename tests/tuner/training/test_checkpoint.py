"""A checkpoint is whole and of this run, or it isn't resumed from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tuner.training.checkpoint import MANIFEST, Checkpoint, Checkpoints


def checkpoint(step: int) -> Checkpoint:
    tensors = {"adapter": {"a": torch.full((3,), float(step))}, "random": {"cpu": torch.ones(2)}}
    return Checkpoint(step, tensors, {"epoch": step // 2})


def cut(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder: Path) -> None:
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit_state(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "epoch": 9}))


def empty_list(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": {}}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "'adapter.safetensors' has changed"),
    "one bit": (flip, "'adapter.safetensors' has changed"),
    "state": (edit_state, "'state.json' has changed"),
    "file missing": (
        lambda folder: (folder / "random.safetensors").unlink(),
        "'random.safetensors' is missing",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "'manifest.json' is missing"),
    "empty manifest": (
        lambda folder: (folder / MANIFEST).write_bytes(b""),
        "'manifest.json' is no JSON",
    ),
    "manifest of nothing": (empty_list, "lists no 'state.json'"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save(checkpoint(3))
    checkpoints.save(checkpoint(4))
    damage(tmp_path / "step-00000004")

    found, refused = checkpoints.restore()
    assert found is not None
    assert (found.step, found.state) == (3, {"epoch": 1})
    assert found.tensors["adapter"]["a"].tolist() == [3.0] * 3
    (sentence,) = refused
    assert "'step-00000004' was not used" in sentence
    assert said in sentence


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "other").save(checkpoint(9))
    checkpoints = Checkpoints(tmp_path, "run")
    found, refused = checkpoints.restore()
    assert found is None
    assert "other settings, data or libraries" in refused[0]
    # What was refused doesn't count among the newest two.
    for step in (1, 2):
        checkpoints.save(checkpoint(step))
    restored, _ = checkpoints.restore()
    assert restored is not None
    assert restored.step == 2


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "run")
    for step in (1, 2, 10):
        checkpoints.save(checkpoint(step))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000010",
    ]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it runs."""


def test_a_kill_at_any_operation_of_a_save_loses_only_that_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    checkpoints = Checkpoints(root, "run")
    for step in (1, 2):
        checkpoints.save(checkpoint(step))
    seen: set[int] = set()
    kept = tmp_path / "kept"
    shutil.copytree(root, kept)
    for kill_at in range(1, 100):
        count = 0

        def counted(
            original: Callable[..., object], kill_at: int = kill_at
        ) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == kill_at:
                    raise Killed
                return original(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "open"), (os, "rmdir")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                checkpoints.save(checkpoint(3))
                killed = False
            except Killed:
                killed = True
        found, refused = checkpoints.restore()
        assert refused == []
        assert found is not None
        assert found.tensors["adapter"]["a"].tolist() == [float(found.step)] * 3
        seen.add(found.step)
        if not killed:
            break
        shutil.rmtree(root)
        shutil.copytree(kept, root)
    assert seen == {2, 3}
    assert kill_at > 8
