# SPDX-License-Identifier: Apache-2.0
"""Blockwise quantization: bounds of the error, and the graph that undoes it."""

import copy

import numpy as np
import onnx
import pytest
import torch
from conftest import TinyModel
from decoder_reference import DecoderReference
from decoder_runner import DecoderRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from starkv.errors import UsageError
from starkv.export.quantize.blockwise import (
    choose_block_size,
    dequantize_blockwise,
    pack_int4,
    quantize_blockwise,
)
from starkv.export.quantize.presets import PRESETS, load_preset
from starkv.export.record import read_record

weights = hnp.arrays(
    np.float32,
    st.sampled_from([(32, 1), (64, 3), (128, 2)]),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(weight=weights, bits=st.sampled_from([4, 8]))
@settings(max_examples=150, deadline=None)
def test_error_is_at_most_half_a_scale(weight: np.ndarray, bits: int) -> None:
    codes, scales = quantize_blockwise(weight, bits, 32)
    assert codes.shape == weight.shape
    assert scales.shape == (weight.shape[0] // 32, weight.shape[1])
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert (scales > 0).all()
    error = np.abs(dequantize_blockwise(codes, scales) - weight)
    # The last bit of the largest code times the scale is rounded as well.
    assert (error <= np.repeat(scales, 32, axis=0) * (0.5 + 1e-4)).all()


@given(weight=weights, bits=st.sampled_from([4, 8]))
@settings(max_examples=50, deadline=None)
def test_quantized_weights_are_a_fixed_point(weight: np.ndarray, bits: int) -> None:
    codes, scales = quantize_blockwise(weight, bits, 32)
    again, _ = quantize_blockwise(dequantize_blockwise(codes, scales), bits, 32)
    np.testing.assert_array_equal(again, codes)


def test_a_scale_belongs_to_one_block_of_one_column() -> None:
    weight = np.ones((64, 2), np.float32)
    weight[40, 1] = 70.0
    codes, scales = quantize_blockwise(weight, 4, 32)
    np.testing.assert_allclose(scales, [[1 / 7, 1 / 7], [1 / 7, 10]], rtol=1e-6)
    assert codes[40, 1] == 7
    assert codes[41, 1] == 0
    assert (codes[:32] == 7).all()
    assert (codes[:, 0] == 7).all()


def test_block_of_zeros_stays_zero() -> None:
    codes, scales = quantize_blockwise(np.zeros((32, 1), np.float32), 8, 32)
    assert not dequantize_blockwise(codes, scales).any()


def test_int4_packing_is_onnx_layout() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 10)).astype(np.int8)
    expected = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, codes.shape, codes.reshape(-1))
    unpacked = onnx.numpy_helper.to_array(expected)
    raw = onnx.TensorProto(
        data_type=onnx.TensorProto.INT4, dims=codes.shape, raw_data=pack_int4(codes).tobytes()
    )
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(raw), unpacked)


@pytest.mark.parametrize(
    ("features", "preferred", "expected"), [(256, 128, 128), (192, 128, 64), (96, 128, 32), (256, 64, 64)]
)
def test_block_size_falls_back(features: int, preferred: int, expected: int) -> None:
    assert choose_block_size(features, preferred, "layer") == expected


def test_block_size_that_never_divides_is_refused() -> None:
    with pytest.raises(UsageError, match="layer has 100 input features, which no block size"):
        choose_block_size(100, 128, "layer")


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown quantization 'int3'; known: fp32, int8, int4"):
        load_preset("int3")


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_quantized_graph_equals_transformers_with_rounded_weights(tiny: TinyModel, preset: str) -> None:
    """The graph's weights are those of the checkpoint, rounded: nothing is transposed, swapped or lost."""
    model = copy.deepcopy(tiny.model)
    chosen = PRESETS[preset]
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "visual" not in name:
            storage = chosen.head if name == "lm_head" else chosen.decoder
            weight = layer.weight.detach().numpy().T
            codes, scales = quantize_blockwise(
                np.ascontiguousarray(weight), 4 if storage == "int4" else 8, 128
            )
            layer.weight.data = torch.from_numpy(dequantize_blockwise(codes, scales).T.copy())
    reference = DecoderReference(model)
    random = np.random.default_rng(3)
    embeds = random.standard_normal((1, 12, 256)).astype(np.float32)
    positions = np.stack([np.arange(12), np.arange(12) // 3, np.arange(12) % 5])[:, None]
    expected = reference.step(embeds, positions, 8)
    # By default ONNX Runtime rounds activations to 8 bits as well.
    config = {"session.qdq_matmulnbits_accuracy_level": "1"}
    export = tiny.exports[preset]
    runner = DecoderRunner(export / "decoder.onnx", read_record(export).text, config=config)
    actual = runner.step(embeds, *reference.rope(positions))
    for field in ("logits", "q_window", "hidden_norm"):
        difference = np.abs(getattr(actual, field) - getattr(expected, field)).max()
        assert difference <= 1e-4 * np.abs(getattr(expected, field)).max()
