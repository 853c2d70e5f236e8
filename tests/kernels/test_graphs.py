# SPDX-License-Identifier: Apache-2.0
"""Calls captured in CUDA graphs: replayed, they do what they did, on whatever the tensors hold by then."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from starkv.kernels.attention_call import AttentionCall, reference_attention
from starkv.kernels.code_rows_reference import reference_dequantize_rows, reference_quantize_rows
from starkv.kernels.cuda_library import KernelLibrary
from starkv.kernels.quantized_attention_reference import reference_quantized_attention
from starkv.validation.attention_checks import AttentionSize, make_call
from starkv.validation.code_rows_calls import CodeRowsSize, make_code_rows_call
from starkv.validation.quantized_calls import QuantizedSize, make_quantized_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]
CLOSE = 2e-2
"""Relative to the norm: outputs and weights are rounded to bfloat16."""


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of some work that ran once before, as capturing asks for."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def assert_attends(call: AttentionCall, out: torch.Tensor) -> None:
    expected = reference_attention(call)[0]
    assert (out.float() - expected).norm() <= CLOSE * expected.norm()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_one_graph_decodes_at_every_length(kernels: KernelLibrary, device: torch.device, dim: int) -> None:
    size = AttentionSize("decode", 2, 1, 500, query_heads=14, kv_heads=2, head_dim=dim)
    call = make_call(size, torch.bfloat16, device)
    out = torch.empty_like(call.q)
    graph = captured(lambda: kernels.attention(call, out=out))
    for lengths in ([3, 500], [400, 0]):
        call.kv_len.copy_(torch.tensor(lengths))
        call.q.normal_()
        expected = replace(call, past_k=call.past_k.clone(), past_v=call.past_v.clone())
        graph.replay()
        torch.cuda.synchronize()
        assert_attends(expected, out)


@pytest.mark.parametrize("dim", [128, 256])
def test_prefill(kernels: KernelLibrary, device: torch.device, dim: int) -> None:
    size = AttentionSize("prefill", 1, 200, 300, query_heads=4, kv_heads=2, head_dim=dim)
    call = make_call(size, torch.bfloat16, device)
    out = torch.empty_like(call.q)
    graph = captured(lambda: kernels.attention(call, out=out))
    out.zero_()
    call.q.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert_attends(call, out)


@pytest.mark.parametrize("bits", [8, 4])
def test_one_graph_decodes_codes_at_every_length(
    kernels: KernelLibrary, device: torch.device, bits: int
) -> None:
    size = QuantizedSize((500, 400), 501, bits, query_heads=14, kv_heads=2)
    call = make_quantized_call(size, torch.bfloat16, device)
    out = torch.empty_like(call.q)
    graph = captured(lambda: kernels.quantized_attention(call, out=out))
    for lengths in ((3, 500), (400, 0)):
        # Parameters follow from the seed alone.
        other = make_quantized_call(replace(size, held=lengths), torch.bfloat16, device)
        other.q.neg_()
        for name in ("q", "k", "v", "past_k", "past_v", "kv_len", "positions"):
            getattr(call, name).copy_(getattr(other, name))
        expected = reference_quantized_attention(other)
        graph.replay()
        torch.cuda.synchronize()
        assert (out.double() - expected[0]).norm() <= CLOSE * expected[0].norm()
        assert torch.equal(call.past_k, expected[1])
        assert torch.equal(call.past_v, expected[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_one_graph_quantizes_and_dequantizes_at_every_length(
    kernels: KernelLibrary, device: torch.device, bits: int
) -> None:
    size = CodeRowsSize((200, 90, 0), 200, 220, bits)
    call = make_code_rows_call(size, torch.bfloat16, device)
    counts: list[torch.Tensor] = []
    quantizing = captured(lambda: counts.append(kernels.quantize_rows(call)))
    dequantizing = captured(lambda: kernels.dequantize_rows(call))
    for lengths in ((7, 200, 33), (0, 1, 199)):
        other = make_code_rows_call(replace(size, lengths=lengths), torch.bfloat16, device, seed=1)
        other.v[1, 0, 3, 0, 5] = torch.inf
        for name in ("k", "v", "lengths", "positions", "k_scale", "v_scale", "k_bias", "v_bias"):
            getattr(call, name).copy_(getattr(other, name))
        k_codes, v_codes, wrong_rows = reference_quantize_rows(call)
        quantizing.replay()
        torch.cuda.synchronize()
        assert torch.equal(call.k_codes, k_codes)
        assert torch.equal(call.v_codes, v_codes)
        assert torch.equal(counts[-1], wrong_rows)
        k, v = reference_dequantize_rows(call)
        dequantizing.replay()
        torch.cuda.synchronize()
        for ours, theirs in ((call.k, k), (call.v, v)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_the_next_token(kernels: KernelLibrary, device: torch.device) -> None:
    logits = torch.randn(3, 1000, device=device)
    ids: list[torch.Tensor] = []
    graph = captured(lambda: ids.append(kernels.argmax(logits)))
    logits.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(ids[-1].long(), logits.argmax(-1))
