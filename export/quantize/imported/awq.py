# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoAWQ: ``quant_method`` "awq", 4 bits, versions "gemm" and "gemv".

A layer with K inputs, N outputs and groups of g inputs, weight = (q − z)·s:

=========  ======================  ===================================================
version    tensor                  shape, dtype
=========  ======================  ===================================================
gemm       qweight                 [K, N/8] int32, packed along N
gemm       qzeros                  [K/g, N/8] int32, packed along N
gemm       scales                  [K/g, N] floating
gemv       qweight                 [N, K/8] int32, packed along K
gemv       qzeros                  [N, w] int32, packed along K/g
gemv       scales                  [N, 8·w] floating, K/g of them used
=========  ======================  ===================================================

Field i of a word of "gemm" holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight; "gemv" packs in order, and
pads w to the width that its kernel loads. With ``zero_point`` off, qzeros are there and hold 8.

Sources: AutoAWQ 0.2.9, awq/modules/linear/gemm.py (``WQLinear_GEMM.from_linear``), gemv.py
(``calculate_zeros_width``), awq/utils/packing_utils.py (``AWQ_ORDER``), awq/models/_config.py; GPTQModel,
gptqmodel/looper/awq_processor.py (symmetric layers), gptqmodel/quantization/config.py (field names).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import AliasChoices, BaseModel, Field

from starkv.errors import CheckpointError
from starkv.export.quantize.columns import Bits
from starkv.export.quantize.imported.common import (
    READABLE,
    ImportedWeight,
    check_scales,
    check_tensor,
    choose_block,
    layer_error,
    matrix_shape,
    parse_fields,
    take_layers,
)
from starkv.export.quantize.imported.words import (
    fields_per_word,
    read_columns_across,
    read_rows_across,
    words_for,
)
from starkv.export.stored_tensor import StoredTensor

_BITS: Bits = 4


class _Config(BaseModel):
    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(validation_alias=AliasChoices("group_size", "q_group_size"))
    version: str = Field("gemm", validation_alias=AliasChoices("version", "checkpoint_format", "format"))


def reader(
    fields: dict[str, Any], path: Path
) -> Callable[[dict[str, StoredTensor]], dict[str, ImportedWeight]]:
    """Check ``quantization_config`` and return a function that takes quantized layers out of tensors by name.

    Raises:
        CheckpointError: a version or number of bits that starkv does not read.
    """
    config = parse_fields(_Config, fields, path)
    version = config.version.lower()
    if version not in ("gemm", "gemv"):
        raise CheckpointError(f"{path}: AWQ version {version} is not supported; starkv reads {READABLE}")
    if config.bits != _BITS:
        raise CheckpointError(
            f"{path}: AWQ with {config.bits} bits is not supported; starkv reads {READABLE}"
        )
    return partial(_read, _gemm_layer if version == "gemm" else _gemv_layer, config.group_size)


def _read(
    read_layer: Callable[[str, dict[str, StoredTensor], int], ImportedWeight],
    group_size: int,
    tensors: dict[str, StoredTensor],
) -> dict[str, ImportedWeight]:
    layers = take_layers(tensors, ("qweight", "qzeros", "scales"))
    return {name: read_layer(name, parts, group_size) for name, parts in layers.items()}


def _groups(name: str, tensor: StoredTensor, inputs: int, group_size: int) -> int:
    if group_size == -1:
        return 1
    if group_size < 1 or inputs % group_size:
        raise layer_error(tensor, f"layer {name}: group_size {group_size} does not divide {inputs} inputs")
    return inputs // group_size


def _gemm_layer(name: str, parts: dict[str, StoredTensor], group_size: int) -> ImportedWeight:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    inputs, words = matrix_shape(qweight)
    groups, outputs = _groups(name, qweight, inputs, group_size), words * fields_per_word(_BITS)
    check_tensor(qweight, (inputs, words), ("I32",))
    check_tensor(qzeros, (groups, words), ("I32",))
    check_scales(scales, (groups, outputs))
    block_size = choose_block(name, qweight, inputs, groups)
    layout = _GemmLayout(qweight, qzeros, scales)
    return ImportedWeight((outputs, inputs), _BITS, groups, block_size, layout)


def _gemv_layer(name: str, parts: dict[str, StoredTensor], group_size: int) -> ImportedWeight:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    outputs, words = matrix_shape(qweight)
    inputs = words * fields_per_word(_BITS)
    groups = _groups(name, qweight, inputs, group_size)
    # The kernel loads zero points of 1024 inputs at once.
    multiple = max(1, 128 * groups // inputs)
    width = -(-words_for(groups, _BITS) // multiple) * multiple
    check_tensor(qweight, (outputs, words), ("I32",))
    check_tensor(qzeros, (outputs, width), ("I32",))
    check_scales(scales, (outputs, width * fields_per_word(_BITS)))
    block_size = choose_block(name, qweight, inputs, groups)
    layout = _GemvLayout(qweight, qzeros, scales, groups)
    return ImportedWeight((outputs, inputs), _BITS, groups, block_size, layout)


@dataclass(frozen=True)
class _GemmLayout:
    qweight: StoredTensor
    qzeros: StoredTensor
    stored_scales: StoredTensor

    def codes(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        return read_columns_across(self.qweight, _BITS, start, stop, _in_order)

    def scales(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.stored_scales.columns(start, stop).astype(np.float32)

    def zero_points(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        return read_columns_across(self.qzeros, _BITS, start, stop, _in_order)


@dataclass(frozen=True)
class _GemvLayout:
    qweight: StoredTensor
    qzeros: StoredTensor
    stored_scales: StoredTensor
    groups: int

    def codes(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        return read_rows_across(self.qweight, _BITS, start, stop)

    def scales(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        scales = self.stored_scales.rows(start, stop)[:, : self.groups]
        return np.ascontiguousarray(scales.T, np.float32)

    def zero_points(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        return read_rows_across(self.qzeros, _BITS, start, stop)[: self.groups]


def _in_order(words: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Put the fields of "gemm" words into the order of their columns: the lower half holds the even ones."""
    stored = words.view(np.uint32)
    even, odd = _spread(stored & np.uint32(0xFFFF)), _spread(stored >> np.uint32(16))
    ordered: npt.NDArray[np.uint32] = even | odd << np.uint32(4)
    return ordered


def _spread(halves: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Move the four lowest 4-bit fields to the lower half of each byte."""
    pairs = (halves | halves << np.uint32(8)) & np.uint32(0x00FF00FF)
    spread: npt.NDArray[np.uint32] = (pairs | pairs << np.uint32(4)) & np.uint32(0x0F0F0F0F)
    return spread
