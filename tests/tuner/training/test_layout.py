"""A tree of sequences gives each of them what it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_model import build_tiny_model
from tests.tuner.training.runs import build_config, example, supervised_rows
from tuner.training.layout import pack, sequences_of, tree_layout
from tuner.training.model import TunedModel

Tokens = tuple[int, ...]

TABLE: dict[str, list[tuple[Tokens, Tokens]]] = {
    "a pair": [((5, 6, 7), (8, 9, 2)), ((5, 6, 7), (10, 2))],
    "two prompts that begin alike": [((5, 6, 7, 8), (9, 2)), ((5, 6, 9), (9, 9, 2))],
    "nothing in common": [((5, 6), (7, 2)), ((8, 9), (10, 11, 2))],
    "one within the other": [((5, 6), (7, 8, 2)), ((5, 6, 7), (8, 2))],
    "the same twice": [((5, 6), (7, 2)), ((5, 6), (7, 2))],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TunedModel:
    torch.set_num_threads(1)
    config = build_config(tmp_path_factory.mktemp("run"), tiny_model, supervised_rows(1))
    return TunedModel(config)


@pytest.mark.parametrize("sequences", TABLE.values(), ids=TABLE)
def test_a_tree_equals_separate_sequences(
    model: TunedModel, sequences: list[tuple[Tokens, Tokens]]
) -> None:
    assert model.uses_tree
    with torch.no_grad():
        together = model.sequence_logprobs(sequences)
        for (prompt, completion), found in zip(sequences, together, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            logits = model._model(input_ids=ids).logits[0].log_softmax(dim=-1)
            positions = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
            expected = logits[positions, torch.tensor(completion)]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_gradients_of_picked_log_probabilities_are_those_of_log_softmax(model: TunedModel) -> None:
    from tuner.training.model import _pick

    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    rows, targets = torch.tensor([0, 0, 3, 1, 0]), torch.tensor([1, 1, 8, 0, 5])
    assert torch.autograd.gradcheck(lambda value: _pick(value, rows, targets), (logits,))
    expected = logits.log_softmax(-1)[rows, targets]
    torch.testing.assert_close(_pick(logits, rows, targets), expected)


@pytest.mark.parametrize(("max_length", "tree"), [(32, True), (33, False)])
def test_a_window_shorter_than_examples_forbids_the_tree(
    tmp_path: Path, max_length: int, tree: bool
) -> None:
    folder = build_tiny_model(tmp_path / "mistral", layers=1, sliding_window=32)
    config = build_config(tmp_path, folder, supervised_rows(1), max_length=max_length)
    model = TunedModel(config)
    assert model.uses_tree is tree
    assert len(model.layouts([((5, 6), (7, 2)), ((5, 6), (8, 2))])) == (1 if tree else 2)


def test_layers_that_look_past_the_mask_are_noticed(
    model: TunedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_additive", lambda mask: None)
    assert not model._tree_is_exact()


def test_what_sequences_begin_with_is_laid_out_once() -> None:
    layout = tree_layout([((5, 6, 7), (8, 9, 2)), ((5, 6, 7), (8, 10, 2))])
    # The last token of a completion predicts nothing that is asked for.
    assert layout.tokens.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 4]]
    assert layout.targets[layout.rows == 0].tolist() == [8, 8]


_tokens = st.lists(st.integers(3, 6), min_size=1, max_size=6)


@given(st.lists(st.tuples(_tokens, _tokens), min_size=1, max_size=8), st.integers(1, 30))
def test_packing_keeps_every_example_and_its_limit(
    drawn: list[tuple[list[int], list[int]]], max_tokens: int
) -> None:
    examples = [
        example(prompt, completion, name=str(index))
        for index, (prompt, completion) in enumerate(drawn)
    ]
    passes = pack(examples, max_tokens=max_tokens)
    assert sorted(one.id for passed in passes for one in passed) == sorted(
        one.id for one in examples
    )
    for passed in passes:
        sequences = [sequence for one in passed for sequence in sequences_of(one)]
        assert len(passed) == 1 or tree_layout(sequences).tokens.shape[1] <= max_tokens
    assert pack(examples[::-1], max_tokens=max_tokens) == passes
