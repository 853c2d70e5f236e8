# SPDX-License-Identifier: Apache-2.0
"""Argmax, nucleus sampling and embedding gather: the kernels against PyTorch, token by token."""

import pytest
import torch
from torch import Tensor

from starkv.kernels.c_abi import KernelError
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.sampling_reference import (
    WEIGHT_BITS,
    argmax_token,
    kept_tokens,
    sample_token,
    token_weights,
)

VOCABULARY = 3001
NAN = float("nan")
INFINITE = float("inf")


def logits_like_a_models(rows: int, spread: float, seed: int = 0) -> Tensor:
    """Mostly unlikely tokens and some that compete; every value twice, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(rows, (VOCABULARY + 1) // 2, generator=generator) * spread
    return half.repeat(1, 2)[:, :VOCABULARY].contiguous()


def sampled(
    kernels: KernelLibrary, device: torch.device, logits: Tensor, *numbers: float | list[float]
) -> list[int]:
    """Tokens for temperature, top_p and uniform, each one for all rows or one per row."""
    rows = len(logits)
    vectors = [torch.tensor(number if isinstance(number, list) else [number] * rows) for number in numbers]
    return kernels.sample_top_p(logits.to(device), *(vector.to(device) for vector in vectors)).tolist()


class TestReference:
    """The integer arithmetic means what it should."""

    def test_weights_are_exponentials(self) -> None:
        logits = torch.linspace(-20, 7, 5000)
        exact = ((logits.double() - 7) / 0.7).exp()
        assert (token_weights(logits, 0.7) / 2.0**WEIGHT_BITS - exact).abs().max() < 2e-7
        assert token_weights(logits, 0.7).max() == 2**WEIGHT_BITS

    def test_weights_never_rise_with_the_distance(self) -> None:
        assert (token_weights(torch.linspace(0, -30, 100_001), 1.0).diff() <= 0).all()

    def test_the_nucleus_is_the_shortest_that_suffices(self) -> None:
        weights = torch.tensor([10, 40, 10, 30, 10])
        assert kept_tokens(weights, 0.7).tolist() == [1, 3]
        assert kept_tokens(weights, 0.71).tolist() == [0, 1, 3]
        assert kept_tokens(weights, 0.9).tolist() == [0, 1, 2, 3]
        assert kept_tokens(weights, 1.0).tolist() == [0, 1, 2, 3, 4]

    def test_frequencies_are_the_renormalised_probabilities(self) -> None:
        logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
        uniforms = (torch.arange(400) + 0.5) / 400
        counts = torch.zeros(4)
        for uniform in uniforms.tolist():
            counts[sample_token(logits, 1.0, 0.9, uniform)] += 1
        kept = torch.tensor([0.0, 1.0, -INFINITE, 0.5]).softmax(0)
        assert (counts / 400 - kept).abs().max() <= 1 / 400


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_samples_are_those_of_the_reference(
    kernels: KernelLibrary, device: torch.device, spread: float, top_p: float
) -> None:
    logits = logits_like_a_models(4, spread)
    temperatures, uniforms = [0.3, 1.0, 1.0, 2.5], [0.0, 0.999999, 0.37, 0.8]
    rows = zip(logits, temperatures, uniforms, strict=True)
    expected = [sample_token(row, temperature, top_p, uniform) for row, temperature, uniform in rows]
    assert sampled(kernels, device, logits, temperatures, top_p, uniforms) == expected


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 1024, 1025])
def test_any_vocabulary(kernels: KernelLibrary, device: torch.device, vocabulary: int) -> None:
    logits = logits_like_a_models(2, 1.0)[:, :vocabulary].contiguous()
    expected = [sample_token(row, 1.0, 0.8, 0.6) for row in logits]
    assert sampled(kernels, device, logits, 1.0, 0.8, 0.6) == expected


def test_of_equal_tokens_at_the_cut_the_first_are_kept(kernels: KernelLibrary, device: torch.device) -> None:
    """A thousand equal tokens, of which the nucleus holds a quarter: the last chosen one is its last."""
    logits = torch.zeros(1, 1000)
    assert sampled(kernels, device, logits, 1.0, 0.25, 0.9999) == [249]


def test_tokens_behind_the_cut_take_no_part(kernels: KernelLibrary, device: torch.device) -> None:
    """The largest token comes last, after equal ones of which only some are kept."""
    logits = torch.zeros(1, 20)
    logits[0, -1] = 2.0
    for uniform in (0.0, 0.1, 0.3, 0.4, 0.5, 0.999999):
        expected = [sample_token(logits[0], 1.0, 0.4, uniform)]
        assert sampled(kernels, device, logits, 1.0, 0.4, uniform) == expected


def test_odd_numbers(kernels: KernelLibrary, device: torch.device) -> None:
    odd = [
        [NAN, 1.0, 3.0, NAN, 3.0],
        [NAN] * 5,
        [-INFINITE, NAN, -INFINITE, -INFINITE, NAN],
        [0.0, INFINITE, 5.0, INFINITE, NAN],
        [-INFINITE, -3.0, -INFINITE, -3.0, -2.9],
    ]
    logits = torch.tensor(odd)
    assert [argmax_token(row) for row in logits] == [2, 0, 0, 1, 4]
    assert kernels.argmax(logits.to(device)).tolist() == [2, 0, 0, 1, 4]
    for uniform in (0.0, 0.5, 0.99):
        expected = [sample_token(row, 1.0, 0.9, uniform) for row in logits]
        assert sampled(kernels, device, logits, 1.0, 0.9, uniform) == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, 1e-30])
def test_no_temperature_takes_the_largest(
    kernels: KernelLibrary, device: torch.device, temperature: float
) -> None:
    logits = logits_like_a_models(3, 2.0)
    expected = [argmax_token(row) for row in logits]
    assert sampled(kernels, device, logits, temperature, 0.1, 0.7) == expected


def test_argmax_takes_the_lowest_of_equal_ones(kernels: KernelLibrary, device: torch.device) -> None:
    logits = logits_like_a_models(5, 2.0)
    assert kernels.argmax(logits.to(device)).tolist() == logits.argmax(-1).tolist()
    zeros = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    assert kernels.argmax(zeros.to(device)).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 37])
def test_rows_of_an_embedding(
    kernels: KernelLibrary, device: torch.device, dtype: torch.dtype, width: int
) -> None:
    table = torch.randn(50, width).to(dtype)
    ids = torch.tensor([49, 0, -1, 50, 7, 7], dtype=torch.int32)
    expected = table[ids.clamp(0, 49).long()]
    expected[2:4] = 0
    gathered = kernels.embedding_gather(table.to(device), ids.to(device))
    assert torch.equal(gathered.cpu(), expected)


def test_what_cannot_be_is_refused(kernels: KernelLibrary, device: torch.device) -> None:
    logits = torch.zeros(2, 5, device=device)
    with pytest.raises(KernelError, match="STARKV_ERROR_SHAPE"):
        kernels.argmax(torch.zeros(1, (1 << 22) + 1, device=device))
    with pytest.raises(KernelError, match="STARKV_ERROR_MISALIGNED"):
        kernels.argmax(logits.view(-1)[1:6].view(1, 5))
