"""The operators that take the place of vLLM's on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engines.cpu_lora import expand, install, is_installed, runs_of, shrink

torch = pytest.importorskip("torch")

SLOTS, RANK, INPUTS, OUTPUTS = 3, 4, 6, 5
Lengths = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 4)), min_size=1, max_size=6)


def metadata(runs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    slots, lengths = zip(*runs, strict=True)
    return torch.tensor(slots), torch.tensor(lengths)


def weights(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)  # the first call may import parts of torch
@given(runs=Lengths, stacked=st.booleans())
def test_every_token_gets_its_own_adapter_and_the_base_none(
    runs: list[tuple[int, int]], stacked: bool
) -> None:
    slots, lengths = metadata(runs)
    tokens = int(lengths.sum())
    x = weights(tokens, INPUTS, seed=1)
    a, b = weights(SLOTS, RANK, INPUTS, seed=2), weights(SLOTS, OUTPUTS, RANK, seed=3)
    before = weights(tokens, OUTPUTS + 4, seed=4)

    expected = before.clone()
    for token, slot in enumerate(torch.repeat_interleave(slots, lengths).tolist()):
        if slot >= 0:
            expected[token, 2 : 2 + OUTPUTS] += b[slot] @ (a[slot] @ x[token] * 0.5)

    if stacked:  # as vLLM keeps them
        a, b = a[:, None], b[:, None]
    middle, output = torch.full((tokens, RANK), 7.0), before.clone()
    shrink(x, a, middle, runs_of(slots, lengths), 0.5)
    expand(middle, b, output, runs_of(slots, lengths), 2, OUTPUTS, add=True)
    torch.testing.assert_close(output, expected)
    assert not middle[torch.repeat_interleave(slots, lengths) < 0].any()


def test_without_add_the_columns_are_replaced_and_the_bases_are_zero() -> None:
    slots, lengths = metadata([(1, 1), (-1, 1)])
    x, b, output = torch.ones(2, RANK), torch.ones(SLOTS, OUTPUTS, RANK), torch.full((2, 6), 9.0)
    expand(x, b, output, runs_of(slots, lengths), 1, OUTPUTS, add=False)
    assert output.tolist() == [[9.0] + [4.0] * OUTPUTS, [9.0] + [0.0] * OUTPUTS]


def test_the_weights_dtype_gives_way_to_the_outputs() -> None:
    slots, lengths = metadata([(0, 2)])
    middle = torch.zeros(2, RANK)
    a = weights(SLOTS, RANK, INPUTS, seed=2).bfloat16()
    shrink(torch.ones(2, INPUTS).bfloat16(), a, middle, runs_of(slots, lengths), 1.0)
    torch.testing.assert_close(middle, a[0].float().sum(1).expand(2, RANK))


def test_an_engine_of_this_environment_finds_the_plugin_and_we_import_no_torch_with_it() -> None:
    assert is_installed()
    code = "import sys, server.engines.cpu_lora; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.engine
def test_vllm_still_has_what_is_replaced() -> None:
    pytest.importorskip("vllm")
    from importlib import import_module

    install()
    install()
    punica = import_module("vllm.lora.punica_wrapper.punica_cpu")
    slots, lengths = metadata([(0, 1), (-1, 1)])
    wrapper = punica.PunicaWrapperCPU(16, 4, "cpu")
    wrapper._update_prefill_metadata(torch.repeat_interleave(slots, lengths))
    wrapper.is_prefill = True
    x, a, b = torch.ones(2, INPUTS), torch.ones(1, 1, RANK, INPUTS), torch.ones(1, 1, OUTPUTS, RANK)
    output = torch.zeros(2, OUTPUTS)
    wrapper.add_lora_linear(output, x, (a,), (b,), 1.0, (OUTPUTS,))
    assert output.tolist() == [[float(INPUTS * RANK)] * OUTPUTS, [0.0] * OUTPUTS]
