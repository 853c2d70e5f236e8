# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of llm-compressor: ``quant_method`` "compressed-tensors", format "pack-quantized", 4 or 8 bits.

A layer with K inputs, N outputs, b bits and G groups (1 with strategy "channel"), weight = (q − z)·s:

==================  ==================================================================================
tensor              shape, dtype
==================  ==================================================================================
weight_packed       [N, K·b/32] int32, packed along K in order
weight_scale        [N, G] floating
weight_shape        [2] int32 or int64: N, K
weight_zero_point   asymmetric only: [N·b/32, G] int32, packed along N; before 0.9.4 [N, G] int8
weight_g_idx        with actorder "group" only: [K] int32, the group of each input, or −1 everywhere
==================  ==================================================================================

Codes and zero points are signed and stored with an offset of 2^(b−1), as int8 zero points are without one.
Which layers have which scheme is told by the tensors' shapes; ``config_groups`` must have such a scheme.

Sources: compressed-tensors 0.8.0, 0.9.3, 0.9.4, 0.12.2 and 0.20.0:
compressors/quantized_compressors/pack_quantized.py (``compress_weight``, ``pack_to_int32``; in 0.20
compressors/pack_quantized/), config/base.py (``CompressionFormat``), quantization/quant_config.py,
quant_args.py, quant_scheme.py, lifecycle/forward.py (``_process_quantization``: ``g_idx``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

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
    read_rows_across,
    unpack_down,
    words_for,
)
from starkv.export.stored_tensor import StoredTensor

_FORMAT = "pack-quantized"
_REQUIRED = ("weight_packed", "weight_scale", "weight_shape")
_OPTIONAL = ("weight_zero_point", "weight_g_idx")


class _Weights(BaseModel):
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None

    @property
    def known_strategy(self) -> str:
        """The strategy, or the one that a group size without a strategy stands for."""
        if self.strategy is not None:
            return self.strategy.lower()
        return "tensor" if self.group_size is None else "channel" if self.group_size == -1 else "group"


class _Scheme(BaseModel):
    weights: _Weights | None = None
    format: str | None = None


class _Part(BaseModel):
    format: str = "dense"


class _Config(BaseModel):
    format: str = _FORMAT
    config_groups: dict[str, _Scheme]
    sparsity_config: _Part | None = None
    transform_config: dict[str, Any] | None = None


def reader(
    fields: dict[str, Any], path: Path
) -> Callable[[dict[str, StoredTensor]], dict[str, ImportedWeight]]:
    """Check ``quantization_config`` and return a function that takes quantized layers out of tensors by name.

    Raises:
        CheckpointError: a format, strategy or number of bits that starkv does not read.
    """
    config = parse_fields(_Config, fields, path)
    schemes = []
    for scheme in config.config_groups.values():
        if scheme.weights is not None:
            _check_scheme(scheme.format or config.format, scheme.weights, path)
            schemes.append(scheme.weights)
    if config.sparsity_config is not None and config.sparsity_config.format != "dense":
        raise _unsupported(f"sparsity format {config.sparsity_config.format}", path)
    if config.transform_config and config.transform_config.get("config_groups"):
        raise _unsupported("transform_config (rotated activations)", path)
    return partial(_read, schemes)


def _check_scheme(stored_format: str, weights: _Weights, path: Path) -> None:
    if stored_format != _FORMAT:
        raise _unsupported(f"format {stored_format}", path)
    if weights.type != "int" or weights.num_bits not in (4, 8):
        raise _unsupported(f"{weights.num_bits} bits of type {weights.type}", path)
    if weights.known_strategy not in ("group", "channel"):
        raise _unsupported(f"strategy {weights.known_strategy}", path)


def _unsupported(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: compressed-tensors with {what} is not supported; starkv reads {READABLE}"
    )


def _read(schemes: list[_Weights], tensors: dict[str, StoredTensor]) -> dict[str, ImportedWeight]:
    layers = take_layers(tensors, _REQUIRED, _OPTIONAL)
    return {name: _layer(name, parts, schemes) for name, parts in layers.items()}


def _layer(name: str, parts: dict[str, StoredTensor], schemes: list[_Weights]) -> ImportedWeight:
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    check_tensor(parts["weight_shape"], (2,), ("I32", "I64"))
    outputs, inputs = (int(size) for size in parts["weight_shape"].array())
    groups = matrix_shape(scale)[1]
    bits = _bits(name, packed, schemes, inputs, groups)
    check_tensor(packed, (outputs, words_for(inputs, bits)), ("I32",))
    check_scales(scale, (outputs, groups))
    block_size = choose_block(name, packed, inputs, groups)
    zero_point = parts.get("weight_zero_point")
    if zero_point is None:
        if not any(scheme.symmetric for scheme in schemes):
            raise layer_error(
                packed, f"layer {name} has no tensor weight_zero_point although it is asymmetric"
            )
    elif zero_point.dtype == "I8":
        check_tensor(zero_point, (outputs, groups), ("I8",))
    else:
        check_tensor(zero_point, (words_for(outputs, bits), groups), ("I32", "I8"))
    order = _input_order(name, parts.get("weight_g_idx"), inputs, groups)
    return ImportedWeight(
        (outputs, inputs), bits, groups, block_size, _Layout(bits, packed, scale, zero_point), order
    )


def _bits(name: str, packed: StoredTensor, schemes: list[_Weights], inputs: int, groups: int) -> Bits:
    """Find the scheme that a layer's shapes belong to.

    Raises:
        CheckpointError: there is none in ``config_groups``.
    """
    words = matrix_shape(packed)[1]
    candidates: tuple[Bits, Bits] = (4, 8)
    for bits in candidates:
        fits = inputs % fields_per_word(bits) == 0 and words_for(inputs, bits) == words
        if fits and any(
            scheme.num_bits == bits
            and (groups == 1 if scheme.known_strategy == "channel" else scheme.group_size == inputs // groups)
            for scheme in schemes
        ):
            return bits
    raise layer_error(
        packed,
        f"layer {name} has {inputs} inputs in {words} words and {groups} groups, "
        "which fits no scheme of quantization_config.config_groups",
    )


def _input_order(
    name: str, index: StoredTensor | None, inputs: int, groups: int
) -> npt.NDArray[np.int64] | None:
    if index is None:
        return None
    check_tensor(index, (inputs,), ("I32", "I64"))
    # A module that was never calibrated keeps -1: its groups are in order.
    return None if (index.array() == -1).all() else group_order(name, index, groups)


@dataclass(frozen=True)
class _Layout:
    bits: Bits
    packed: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None

    def codes(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        return read_rows_across(self.packed, self.bits, start, stop)

    def scales(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(self.scale.rows(start, stop).T.astype(np.float32))

    def zero_points(self, start: int, stop: int) -> npt.NDArray[np.int8] | None:
        if self.zero_point is None:
            return None
        if self.zero_point.dtype == "I8":
            return np.ascontiguousarray(self.zero_point.rows(start, stop).T)
        fields = fields_per_word(self.bits)
        first = start // fields
        words = self.zero_point.rows(first, words_for(stop, self.bits))
        unpacked = unpack_down(words, self.bits)[start - first * fields : stop - first * fields]
        return np.ascontiguousarray(unpacked.T)
