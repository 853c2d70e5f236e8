# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints that are damaged, inconsistent or of a kind that starkv can't read: a clear line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imported_files import (
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

from starkv.errors import CheckpointError
from starkv.export.checkpoint import Checkpoint

LAYER = "model.layers.0.mlp.up_proj"
NAME = "model.language_model.layers.0.mlp.up_proj.weight"
READABLE = r"; starkv reads AWQ \(4 bits, gemm or gemv\), GPTQ .* and weights that are not quantized$"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught, Checkpoint(folder):
        pass
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def scheme(**weights: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors with other fields of its weights."""
    config = compressed_config(32)
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "weights quantized with fp8 are not supported"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "with bitsandbytes are not supported"),
        ({"quant_method": "GGUF"}, "with gguf are not supported"),
        ({"load_in_8bit": True}, "with an unknown method are not supported"),
        (awq_config(128, "gemv_fast"), "AWQ version gemv_fast is not supported"),
        (awq_config(128, "marlin"), "AWQ version marlin is not supported"),
        (awq_config(128) | {"bits": 3}, "AWQ with 3 bits is not supported"),
        (gptq_config(128, 3), "GPTQ with 3 bits is not supported"),
        (gptq_config(128, checkpoint_format="marlin"), "GPTQ format marlin is not supported"),
        (gptq_config(128, is_marlin_format=True), "GPTQ format marlin is not supported"),
        (gptq_config(128, format="bitblas"), "GPTQ format bitblas is not supported"),
        (compressed_config(32, format="marlin-24"), "format marlin-24 is not supported"),
        (compressed_config(32, format="int-quantized"), "format int-quantized is not supported"),
        (compressed_config(32, format="nvfp4-pack-quantized"), "format nvfp4-pack-quantized is not"),
        (scheme(num_bits=3), "3 bits of type int is not supported"),
        (scheme(type="float"), "4 bits of type float is not supported"),
        (scheme(strategy="tensor"), "strategy tensor is not supported"),
        (scheme(strategy=None, group_size=None), "strategy tensor is not supported"),
        (compressed_config(32, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask is not"),
        (compressed_config(32, transform_config={"config_groups": {"R1": {}}}), "transform_config .* is not"),
    ],
)
def test_kinds_that_starkv_cannot_read(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    refused(
        write_checkpoint(tmp_path, config, {LAYER: awq_gemm(random_layer(64, 16, 2))}),
        message + ".*" + READABLE,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "quantization_config is no JSON object"),
        ({"quant_method": "awq"}, r"quantization_config: field bits: Field required"),
        ({"quant_method": "gptq", "bits": 4}, r"quantization_config: field group_size: Field required"),
        (
            gptq_config(128) | {"bits": "four"},
            r"quantization_config: field bits: Input should be a valid int",
        ),
        ({"quant_method": "compressed-tensors"}, "quantization_config: field config_groups: Field required"),
        (
            compressed_config(32) | {"config_groups": {"W4A16": ["Linear"]}},
            "field config_groups.W4A16: Input",
        ),
    ],
)
def test_unreadable_configurations(tmp_path: Path, config: Any, message: str) -> None:
    refused(write_checkpoint(tmp_path, config, {}), message)


@pytest.mark.parametrize("config", [awq_config(32), gptq_config(32), compressed_config(32)])
def test_no_tensor_is_quantized(tmp_path: Path, config: dict[str, Any]) -> None:
    refused(
        write_checkpoint(tmp_path, config, {}),
        f"quantization_config says {config['quant_method']}, but no tensor is quantized",
    )


def test_quantized_tensors_without_a_configuration(tmp_path: Path) -> None:
    layers = {LAYER: awq_gemm(random_layer(64, 16, 2))}
    refused(
        write_checkpoint(tmp_path, None, layers),
        rf"tensor {LAYER}\.q\w+ has dtype I32; .* integers of layers that quantization_config declares",
    )


def test_integers_that_are_no_part_of_a_layer(tmp_path: Path) -> None:
    plain = {"model.position_ids": np.arange(5)}
    folder = write_checkpoint(tmp_path, awq_config(32), {LAYER: awq_gemm(random_layer(64, 16, 2))}, plain)
    refused(folder, r"tensor model\.position_ids has dtype I64; starkv reads F32, F16, BF16 only")


SMALL = random_layer(64, 16, 2)
SHUFFLED = random_layer(64, 16, 2, shuffled=True)
AWQ, GEMV, GPTQ, COMPRESSED = awq_gemm(SMALL), awq_gemv(SMALL), gptq(SHUFFLED), compressed(SMALL)
CASES: list[tuple[dict[str, Any], Tensors]] = [
    (awq_config(32), AWQ),
    (awq_config(32, "gemv"), GEMV),
    (gptq_config(32, desc_act=True), GPTQ),
    (compressed_config(32), COMPRESSED),
]
KINDS = ["awq", "gemv", "gptq", "compressed"]


@pytest.mark.parametrize(("config", "tensors"), CASES, ids=KINDS)
def test_every_tensor_of_a_layer_is_needed(tmp_path: Path, config: dict[str, Any], tensors: Tensors) -> None:
    for missing in tensors:
        rest = {part: array for part, array in tensors.items() if part != missing}
        folder = write_checkpoint(tmp_path, config, {LAYER: rest})
        refused(folder, rf"model\.safetensors: layer {NAME[:-7]} has no tensor {missing}")


@pytest.mark.parametrize(("config", "tensors"), CASES, ids=KINDS)
@pytest.mark.parametrize("change", ["row", "column", "axis", "dtype"])
def test_every_shape_and_dtype_is_checked(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, change: str
) -> None:
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "row": lambda array: array[1:],
        "column": lambda array: array[..., 1:],
        "axis": lambda array: array[None],
        "dtype": lambda array: array.astype(np.int8 if array.dtype != np.int8 else np.int32),
    }
    for part in tensors:
        folder = write_checkpoint(tmp_path, config, {LAYER: tensors | {part: changes[change](tensors[part])}})
        refused(folder, rf"model\.safetensors: (tensor|layer) (model\.|{LAYER})")


@pytest.mark.parametrize(("config", "tensors"), CASES, ids=KINDS)
def test_stored_twice(tmp_path: Path, config: dict[str, Any], tensors: Tensors) -> None:
    plain = {f"{LAYER}.weight": np.ones((16, 64), np.float16)}
    refused(write_checkpoint(tmp_path, config, {LAYER: tensors}, plain), "is stored both quantized and as")


@pytest.mark.parametrize(("config", "tensors"), CASES, ids=KINDS)
def test_an_embedding_is_never_quantized(tmp_path: Path, config: dict[str, Any], tensors: Tensors) -> None:
    folder = write_checkpoint(tmp_path, config, {"model.embed_tokens": tensors})
    refused(folder, r"the embedding model\.language_model\.embed_tokens\.weight is quantized")


@pytest.mark.parametrize(
    ("group_size", "inputs", "message"),
    [
        (8, 64, "64 inputs in 8 groups; starkv reads groups of equal size, a power of two of at least 16"),
        (24, 48, "48 inputs in 2 groups; starkv reads groups of equal size"),
        (-1, 48, r"48 inputs, which none of the block sizes \(128, 64, 32\) divides"),
    ],
)
@pytest.mark.parametrize("kind", ["awq", "gptq", "compressed"])
def test_group_sizes_that_no_runtime_knows(
    tmp_path: Path, kind: str, group_size: int, inputs: int, message: str
) -> None:
    layer = random_layer(inputs, 16, 1 if group_size == -1 else inputs // group_size)
    config, tensors = {
        "awq": (awq_config(group_size), awq_gemm(layer)),
        "gptq": (gptq_config(group_size), gptq(layer)),
        "compressed": (compressed_config(group_size), compressed(layer)),
    }[kind]
    refused(write_checkpoint(tmp_path, config, {LAYER: tensors}), message)


@pytest.mark.parametrize("group_size", [0, 48])
def test_group_size_that_does_not_divide(tmp_path: Path, group_size: int) -> None:
    for config, tensors in ((awq_config(group_size), AWQ), (gptq_config(group_size), GPTQ)):
        folder = write_checkpoint(tmp_path, config, {LAYER: tensors})
        refused(folder, f"group_size {group_size} does not divide 64 inputs")


def test_scheme_that_is_not_declared(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, compressed_config(64), {LAYER: COMPRESSED})
    refused(folder, "64 inputs in 8 words and 2 groups, which fits no scheme of quantization_config")


@pytest.mark.parametrize("index", [[0] * 40 + [1] * 24, [0] * 32 + [2] * 32, [-1] * 64])
def test_groups_of_unequal_size(tmp_path: Path, index: list[int]) -> None:
    tensors = GPTQ | {"g_idx": np.array(index, np.int32)}
    folder = write_checkpoint(tmp_path, gptq_config(32, desc_act=True), {LAYER: tensors})
    refused(folder, r"up_proj\.g_idx does not put 32 inputs into each of 2 groups")


def test_zero_points_that_tools_read_differently(tmp_path: Path) -> None:
    tensors = gptq(random_layer(64, 16, 2))
    # 0 less one within its four bits.
    tensors["qzeros"][1, 0] |= 0xF << 20
    folder = write_checkpoint(tmp_path, gptq_config(32), {LAYER: tensors})
    with (
        Checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"has zero points of 0, .* save it as gptq_v2"),
    ):
        checkpoint.rows(NAME, 0, 16)
