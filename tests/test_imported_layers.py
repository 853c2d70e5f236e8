# SPDX-License-Identifier: Apache-2.0
"""Layers of quantized checkpoints: integers, scales and zero points exactly as the file has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from imported_files import (
    RandomLayer,
    Tensors,
    awq_config,
    awq_gemm,
    awq_gemv,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
    random_layer,
    write_checkpoint,
)

from starkv.export.checkpoint import Checkpoint
from starkv.export.quantize.columns import ImportedQuantization, PackedWeight

LAYER = "model.layers.0.mlp.up_proj"
NAME = "model.language_model.layers.0.mlp.up_proj.weight"


def check(folder: Path, layer: RandomLayer, quantization: dict[str, Any], tensors: Tensors) -> PackedWeight:
    """Compare everything that a checkpoint says of one layer with the layer; returns it."""
    with Checkpoint(write_checkpoint(folder, quantization, {LAYER: tensors})) as checkpoint:
        packed = checkpoint.packed(NAME)
        assert packed is not None
        inputs, outputs = layer.q.shape
        assert packed.shape == checkpoint.shape(NAME) == (outputs, inputs)
        assert packed.bits == layer.bits
        assert checkpoint.stored_dtype(NAME) == f"I{layer.bits}"
        for start, stop in ((0, outputs), (0, 2), (3, 13), (outputs - 5, outputs)):
            check_columns(packed, layer, start, stop)
            np.testing.assert_array_equal(checkpoint.rows(NAME, start, stop), layer.weight[start:stop])
        assert checkpoint.array(NAME).dtype == np.float32
    return packed


def check_columns(packed: PackedWeight, layer: RandomLayer, start: int, stop: int) -> None:
    columns = packed.columns(start, stop)
    order = np.arange(len(layer.q)) if packed.input_order is None else packed.input_order
    half = 2 ** (layer.bits - 1)
    assert columns.codes.dtype == np.int8
    np.testing.assert_array_equal(columns.codes, (layer.q - half)[order, start:stop])
    # A block's inputs are of one group.
    group_of_block = layer.group_of[order].reshape(-1, packed.block_size)
    assert (group_of_block == group_of_block[:, :1]).all()
    groups = group_of_block[:, 0]
    assert columns.scales.dtype == np.float32
    np.testing.assert_array_equal(columns.scales, layer.s.astype(np.float32)[groups, start:stop])
    assert packed.has_zero_points == (layer.z != half).any()
    if not packed.has_zero_points:
        assert columns.zero_points is None
    else:
        assert columns.zero_points is not None
        assert columns.zero_points.dtype == np.int8
        np.testing.assert_array_equal(columns.zero_points, (layer.z - half)[groups, start:stop])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
def test_awq(tmp_path: Path, group_size: int, symmetric: bool) -> None:
    groups = 1 if group_size == -1 else 256 // group_size
    layer = random_layer(256, 48, groups, symmetric=symmetric)
    packed = check(tmp_path, layer, awq_config(group_size), awq_gemm(layer))
    assert packed.block_size == (128 if group_size == -1 else group_size)
    assert packed.input_order is None


@pytest.mark.parametrize(
    ("group_size", "inputs"), [(32, 256), (32, 2048), (64, 256), (128, 1152), (256, 512), (-1, 256)]
)
def test_awq_packed_along_inputs(tmp_path: Path, group_size: int, inputs: int) -> None:
    layer = random_layer(inputs, 40, 1 if group_size == -1 else inputs // group_size)
    check(tmp_path, layer, awq_config(group_size, "gemv"), awq_gemv(layer))


def test_awq_zero_point_of_zero(tmp_path: Path) -> None:
    layer = random_layer(256, 48, 2)
    layer.z[:] = 0
    check(tmp_path, layer, awq_config(128), awq_gemm(layer))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(tmp_path: Path, bits: int, shuffled: bool, symmetric: bool, second: bool) -> None:
    layer = random_layer(256, 44, 8, bits=bits, shuffled=shuffled, symmetric=symmetric)
    name = "gptq_v2" if second else "gptq"
    config = gptq_config(32, bits, desc_act=shuffled, checkpoint_format=name)
    packed = check(tmp_path, layer, config, gptq(layer, second=second))
    assert (packed.input_order is not None) == shuffled
    assert packed.block_size == 32


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_by_channel_without_an_index(tmp_path: Path, bits: int) -> None:
    layer = random_layer(192, 40, 1, bits=bits)
    tensors = gptq(layer)
    del tensors["g_idx"]
    assert check(tmp_path, layer, gptq_config(-1, bits), tensors).block_size == 64


def test_gptq_second_format_has_zero_points_of_zero(tmp_path: Path) -> None:
    layer = random_layer(256, 40, 2)
    layer.z[:, ::3] = 0
    check(tmp_path, layer, gptq_config(128, format="gptq_v2"), gptq(layer, second=True))


def test_gptq_input_order_keeps_inputs_of_a_group_in_order(tmp_path: Path) -> None:
    layer = random_layer(128, 40, 4, shuffled=True)
    order = check(tmp_path, layer, gptq_config(32, desc_act=True), gptq(layer)).input_order
    assert order is not None
    assert sorted(order.tolist()) == list(range(128))
    assert (np.diff(order.reshape(4, 32), axis=1) > 0).all()


def test_gptq_layers_with_bits_of_their_own(tmp_path: Path) -> None:
    small, large = random_layer(256, 40, 2), random_layer(256, 40, 8, bits=8)
    layers = {LAYER: gptq(small), "model.layers.1.mlp.up_proj": gptq(large)}
    config = gptq_config(128, dynamic={r"+:.*\.1\..*": {"bits": 8, "group_size": 32}, "-:visual": {}})
    with Checkpoint(write_checkpoint(tmp_path, config, layers)) as checkpoint:
        assert checkpoint.stored_dtype(NAME) == "I4"
        assert checkpoint.stored_dtype(NAME.replace("0", "1")) == "I8"
        np.testing.assert_array_equal(checkpoint.array(NAME), small.weight)
        np.testing.assert_array_equal(checkpoint.array(NAME.replace("0", "1")), large.weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors(tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    groups = 1 if group_size == -1 else 192 // group_size
    # 42 outputs do not fill words of zero points.
    layer = random_layer(192, 42, groups, bits=bits, symmetric=symmetric, dtype=ml_dtypes.bfloat16)
    config = compressed_config(group_size, bits, symmetric)
    packed = check(tmp_path, layer, config, compressed(layer, symmetric=symmetric))
    assert packed.block_size == (64 if group_size == -1 else group_size)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_in_order_of_activation(tmp_path: Path, bits: int) -> None:
    layer = random_layer(256, 40, 4, bits=bits, shuffled=True)
    assert check(tmp_path, layer, compressed_config(64, bits), compressed(layer)).input_order is not None


def test_compressed_tensors_with_an_unused_index(tmp_path: Path) -> None:
    layer = random_layer(256, 40, 4)
    tensors = compressed(layer) | {"weight_g_idx": np.full(256, -1, np.int32)}
    assert check(tmp_path, layer, compressed_config(64), tensors).input_order is None


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_with_zero_points_as_bytes(tmp_path: Path, bits: int) -> None:
    layer = random_layer(256, 40, 4, bits=bits)
    check(tmp_path, layer, compressed_config(64, bits), compressed(layer, unpacked_zero_points=True))


def test_compressed_tensors_with_several_schemes(tmp_path: Path) -> None:
    small, large = random_layer(256, 40, 2, symmetric=True), random_layer(256, 40, 1, bits=8, symmetric=True)
    layers = {
        LAYER: compressed(small, symmetric=True),
        "model.layers.1.mlp.up_proj": compressed(large, symmetric=True),
        "model.layers.2.mlp.up_proj": compressed(large, symmetric=True),
    }
    groups = {
        "a": compressed_config(128, 4, True)["config_groups"]["group_0"],
        "b": compressed_config(-1, 8, True)["config_groups"]["group_0"] | {"format": "pack-quantized"},
    }
    config = compressed_config(128, format="mixed-precision") | {"config_groups": groups}
    config["config_groups"]["a"]["format"] = "pack-quantized"
    with Checkpoint(write_checkpoint(tmp_path, config, layers)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.array(NAME), small.weight)
        np.testing.assert_array_equal(checkpoint.array(NAME.replace("0", "1")), large.weight)
        assert checkpoint.quantization == ImportedQuantization("compressed-tensors", 8, -1)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_scales_of_any_dtype(tmp_path: Path, dtype: Any) -> None:
    layer = random_layer(256, 40, 2, dtype=dtype)
    check(tmp_path, layer, gptq_config(128), gptq(layer))


Write = Callable[[RandomLayer], Tensors]


@pytest.mark.parametrize(
    ("config", "write", "method"),
    [
        (awq_config(32), awq_gemm, "awq"),
        (gptq_config(32), gptq, "gptq"),
        (compressed_config(32), compressed, "compressed-tensors"),
    ],
)
def test_a_layer_appears_once_among_plain_tensors(
    tmp_path: Path, config: dict[str, Any], write: Write, method: str
) -> None:
    layer = random_layer(64, 40, 2)
    plain: Tensors = {
        "visual.patch_embed.proj.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        f"{LAYER}.bias": np.arange(40, dtype=np.float16),
    }
    with Checkpoint(write_checkpoint(tmp_path, config, {LAYER: write(layer)}, plain)) as checkpoint:
        assert checkpoint.names() == [
            NAME.replace("weight", "bias"),
            NAME,
            "model.visual.patch_embed.proj.weight",
        ]
        assert NAME in checkpoint
        assert NAME.replace("weight", "scales") not in checkpoint
        assert checkpoint.parameters == 64 * 40 + 40 + 6
        assert checkpoint.packed("model.visual.patch_embed.proj.weight") is None
        assert checkpoint.quantization == ImportedQuantization(method, 4, 32)
        np.testing.assert_array_equal(checkpoint.array(NAME.replace("weight", "bias")), np.arange(40))


def test_a_checkpoint_that_is_not_quantized_says_so(tmp_path: Path) -> None:
    with Checkpoint(write_checkpoint(tmp_path, None, {})) as checkpoint:
        assert checkpoint.quantization is None
        assert checkpoint.packed("lm_head.weight") is None
