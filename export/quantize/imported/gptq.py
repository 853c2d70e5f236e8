# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoGPTQ and GPTQModel: ``quant_method`` "gptq", 4 or 8 bits, formats "gptq" and "gptq_v2".

A layer with K inputs, N outputs, b bits and G groups, weight[k] = (q[k] − z[g_idx[k]])·s[g_idx[k]]:

=========  ==========================================================
tensor     shape, dtype
=========  ==========================================================
qweight    [K·b/32, N] int32, packed along K
qzeros     [G, N·b/32] int32, packed along N
scales     [G, N] floating
g_idx      [K] int32, the group of each input; may be absent
=========  ==========================================================

Fields are packed in order. Format "gptq" (v1, also where nothing is said) stores z − 1, "gptq_v2" stores z.
With v1, z = 0 wraps to the largest field, and readers disagree what that means: AutoGPTQ's and ExLlama's
kernels add 1 within the field, GPTQModel adds 1 to each field of the word with carries: such files are
refused.

With ``desc_act``, groups are filled in order of activation, so ``g_idx`` is not sorted. ``dynamic`` in
GPTQModel's configuration gives layers bits and groups of their own; then the tensors' shapes say which.

Sources: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (``pack``, ``forward``),
autogptq_extension/exllamav2/cuda/q_gemm_kernel_gptq.cuh, auto_gptq/quantization/config.py; GPTQModel,
gptqmodel/utils/model.py (``convert_gptq_v1_to_v2_format_module``), gptqmodel/nn_modules/qlinear/__init__.py
(``_register_gptq_buffers``, ``_dequantize_from_codes``), gptqmodel/quantization/config.py.
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
    group_order,
    layer_error,
    matrix_shape,
    parse_fields,
    take_layers,
)
from starkv.export.quantize.imported.words import (
    fields_per_word,
    read_columns_across,
    read_columns_down,
    words_for,
)
from starkv.export.stored_tensor import StoredTensor

_FORMATS = ("gptq", "gptq_v2")


class _Config(BaseModel):
    bits: int
    group_size: int
    desc_act: bool | None = None
    checkpoint_format: str = Field("gptq", validation_alias=AliasChoices("checkpoint_format", "format"))
    is_marlin_format: bool | None = None
    dynamic: dict[str, Any] | None = None


def reader(
    fields: dict[str, Any], path: Path
) -> Callable[[dict[str, StoredTensor]], dict[str, ImportedWeight]]:
    """Check ``quantization_config`` and return a function that takes quantized layers out of tensors by name.

    Raises:
        CheckpointError: a format or number of bits that starkv does not read.
    """
    config = parse_fields(_Config, fields, path)
    stored_format = "marlin" if config.is_marlin_format else config.checkpoint_format.lower()
    if stored_format not in _FORMATS:
        raise CheckpointError(
            f"{path}: GPTQ format {stored_format} is not supported; starkv reads {READABLE}"
        )
    if config.bits not in (4, 8):
        raise CheckpointError(
            f"{path}: GPTQ with {config.bits} bits is not supported; starkv reads {READABLE}"
        )
    return partial(_read, config, stored_format == "gptq")


def _read(
    config: _Config, zeros_less_one: bool, tensors: dict[str, StoredTensor]
) -> dict[str, ImportedWeight]:
    layers = take_layers(tensors, ("qweight", "qzeros", "scales"), ("g_idx",))
    return {name: _layer(name, parts, config, zeros_less_one) for name, parts in layers.items()}


def _layer(
    name: str, parts: dict[str, StoredTensor], config: _Config, zeros_less_one: bool
) -> ImportedWeight:
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    words, outputs = matrix_shape(qweight)
    groups, zero_words = matrix_shape(qzeros)
    bits = _bits(config, outputs, zero_words)
    inputs = words * fields_per_word(bits)
    if not config.dynamic:
        groups = _groups(name, qweight, inputs, config.group_size)
    check_tensor(qweight, (words, outputs), ("I32",))
    check_tensor(qzeros, (groups, words_for(outputs, bits)), ("I32",))
    check_scales(scales, (groups, outputs))
    block_size = choose_block(name, qweight, inputs, groups)
    order = None
    if "g_idx" in parts:
        check_tensor(parts["g_idx"], (inputs,), ("I32", "I64"))
        order = group_order(name, parts["g_idx"], groups)
    elif config.desc_act and groups > 1:
        raise layer_error(qweight, f"layer {name} has no tensor g_idx although desc_act is on")
    layout = _Layout(name, bits, zeros_less_one, qweight, qzeros, scales)
    return ImportedWeight((outputs, inputs), bits, groups, block_size, layout, order)


def _bits(config: _Config, outputs: int, zero_words: int) -> Bits:
    """Bits of a layer, by the width of its zero points where layers have bits of their own."""
    stated: Bits = 4 if config.bits == 4 else 8
    other: Bits = 8 if config.bits == 4 else 4
    fits_other_only = words_for(outputs, stated) != zero_words == words_for(outputs, other)
    return other if config.dynamic and fits_other_only else stated


def _groups(name: str, tensor: StoredTensor, inputs: int, group_size: int) -> int:
    if group_size == -1:
        return 1
    if group_size < 1 or inputs % group_size:
        raise layer_error(tensor, f"layer {name}: group_size {group_size} does not divide {inputs} inputs")
    return inputs // group_size


@dataclass(frozen=True)
class _Layout:
    layer: str
    bits: Bits
    zeros_less_one: bool
    qweight: StoredTensor
    qzeros: StoredTensor
    stored_scales: StoredTensor

    def codes(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        return read_columns_down(self.qweight, self.bits, start, stop)

    def scales(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.stored_scales.columns(start, stop).astype(np.float32)

    def zero_points(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        zero_points = read_columns_across(self.qzeros, self.bits, start, stop)
        if not self.zeros_less_one:
            return zero_points
        largest = 2 ** (self.bits - 1) - 1
        if (zero_points == largest).any():
            raise layer_error(
                self.qzeros,
                f"layer {self.layer} has zero points of 0, which tools read differently in GPTQ format v1; "
                "save it as gptq_v2",
            )
        zero_points += np.int8(1)
        return zero_points
