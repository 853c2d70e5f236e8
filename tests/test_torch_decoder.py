# SPDX-License-Identifier: Apache-2.0
"""The PyTorch decoder by itself: what comparing engines doesn't reach."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyModel
from engine_runs import assert_close, naive_attention, random_embeds
from tiny_model import make_tiny_model
from torch import Tensor

from starkv.manifest import TextShape, read_manifest
from starkv.runtime.engines import torch_decoder
from starkv.runtime.engines.torch_decoder import DecoderStep, TorchCache, TorchDecoder, attention_sums
from starkv.runtime.preprocess.positions import rope_tables, text_positions


@pytest.fixture(scope="module")
def text(tiny: TinyModel) -> TextShape:
    return read_manifest(tiny.engine).text


def decoder_of(
    model: torch.nn.Module, text: TextShape, dtype: torch.dtype = torch.float32, **more: Tensor
) -> TorchDecoder:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return TorchDecoder(text, model.config.text_config.rms_norm_eps, weights | more, dtype)


def step(decoder: TorchDecoder, rows: int, cache: TorchCache, start: int = 0) -> DecoderStep:
    """Append random rows to one sequence."""
    tables = rope_tables(text_positions(rows, start).values, decoder.shape)
    embeds = torch.from_numpy(random_embeds(rows, start))[None]
    return decoder.step(embeds, *(torch.from_numpy(table) for table in tables), cache)


def test_a_cache_per_query_head_computes_the_same(tiny: TinyModel, text: TextShape) -> None:
    """Rows of KV heads, and copies of them for every query head, in layers of different lengths."""
    decoder, copies = decoder_of(tiny.model, text), text.heads // text.kv_heads
    shared = TorchCache.allocate(text, 1, 30, torch.float32)
    step(decoder, 20, shared)
    shared.lengths[1] = 11
    per_head = [cache.repeat_interleave(copies, 2) for cache in (shared.keys, shared.values)]
    repeated = TorchCache(*per_head, shared.lengths.clone())
    actual, expected = (step(decoder, 3, cache, 20) for cache in (repeated, shared))
    assert_close(actual.logits.numpy(), expected.logits.numpy())
    np.testing.assert_array_equal(repeated.lengths, [[23], [14]])
    assert_close(repeated.keys[:, :, ::copies].numpy(), shared.keys.numpy())
    assert_close(repeated.keys[:, :, copies - 1 :: copies].numpy(), shared.keys.numpy())


def test_a_tied_head_is_the_embedding(tmp_path: Path, text: TextShape) -> None:
    model = make_tiny_model(tmp_path, tied=True)
    embedding = model.get_input_embeddings().weight.detach()
    tied = decoder_of(model, text.model_copy(update={"tied_embedding": True}))
    untied = decoder_of(model, text, **{"lm_head.weight": embedding})
    logits = [
        step(decoder, 5, TorchCache.allocate(text, 1, 5, torch.float32)).logits for decoder in (tied, untied)
    ]
    assert torch.equal(*logits)


def test_bfloat16_stays_close(tiny: TinyModel, text: TextShape) -> None:
    narrow, wide = (
        step(decoder_of(tiny.model, text, dtype), 20, TorchCache.allocate(text, 1, 20, dtype)).logits
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert narrow.dtype == torch.float32
    assert torch.cosine_similarity(narrow, wide) > 0.99


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_attention_sums_equal_naive_ones(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(torch_decoder, "QUERY_CHUNK", chunk)
    torch.manual_seed(0)
    queries, keys = 2 * torch.randn(2, 1, 6, 40, 8), torch.randn(2, 1, 3, 40, 8)
    torch.testing.assert_close(attention_sums(queries, keys), naive_attention(queries, keys).sum(-2))
