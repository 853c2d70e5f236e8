# SPDX-License-Identifier: Apache-2.0
"""What formats of quantized checkpoints have in common: layers of several tensors, groups and their order."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from starkv.errors import CheckpointError
from starkv.export.quantize.blockwise import BLOCK_SIZES
from starkv.export.quantize.columns import Bits, PackedWeight, QuantizedColumns
from starkv.export.safetensors_header import DTYPES
from starkv.export.stored_tensor import StoredTensor

READABLE = (
    "AWQ (4 bits, gemm or gemv), GPTQ (4 or 8 bits), compressed-tensors (pack-quantized, 4 or 8 bits) "
    "and weights that are not quantized"
)
"""What an error about an unknown format offers instead."""

_Model = TypeVar("_Model", bound=BaseModel)
_Layer = dict[str, StoredTensor]


class Layout(Protocol):
    """Reads one layer's tensors [K inputs, N outputs] column by column, K in the order of the file."""

    def codes(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        """Signed codes [K, stop-start]."""

    def scales(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Scales [groups, stop-start]."""

    def zero_points(self, start: int, stop: int) -> npt.NDArray[np.int8] | None:
        """Signed zero points [groups, stop-start], or None if the layer has none."""


@dataclass(frozen=True)
class ImportedWeight:
    """A :class:`~starkv.export.quantize.columns.PackedWeight` of a checkpoint."""

    shape: tuple[int, int]
    bits: Bits
    groups: int
    block_size: int
    layout: Layout
    input_order: npt.NDArray[np.int64] | None = None

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; −1 for all."""
        return -1 if self.groups == 1 else self.shape[1] // self.groups

    @cached_property
    def has_zero_points(self) -> bool:
        """Whether any zero point differs from 0."""
        zero_points = self.layout.zero_points(0, self.shape[0])
        return zero_points is not None and bool(zero_points.any())

    def columns(self, start: int, stop: int) -> QuantizedColumns:
        """Outputs ``start … stop-1``; a channel's scale is repeated for each of its blocks."""
        repeats = self.shape[1] // self.block_size // self.groups
        codes = self.layout.codes(start, stop)
        if self.input_order is not None:
            codes = codes[self.input_order]
        scales = np.repeat(self.layout.scales(start, stop), repeats, axis=0)
        zero_points = self.layout.zero_points(start, stop) if self.has_zero_points else None
        if zero_points is not None:
            zero_points = np.repeat(zero_points, repeats, axis=0)
        return QuantizedColumns(codes, scales, zero_points)


def dequantize_rows(weight: PackedWeight, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return the outputs ``start … stop-1`` of a weight as float32 [stop-start, K], inputs in their order."""
    columns = weight.columns(start, stop)
    shape = (-1, weight.block_size, stop - start)
    codes = columns.codes.astype(np.float32).reshape(shape)
    if columns.zero_points is not None:
        codes -= columns.zero_points[:, None]
    codes *= columns.scales[:, None]
    rows = np.empty((stop - start, weight.shape[1]), np.float32)
    order = slice(None) if weight.input_order is None else weight.input_order
    rows[:, order] = codes.reshape(weight.shape[1], stop - start).T
    return rows


def parse_fields(model: type[_Model], fields: dict[str, Any], path: Path) -> _Model:
    """Read ``quantization_config``.

    Raises:
        CheckpointError: a field is missing or has no such value.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: quantization_config: field {field}: {first['msg']}") from None


def take_layers(
    tensors: dict[str, StoredTensor], required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, _Layer]:
    """Take the tensors of quantized layers out of ``tensors``.

    Returns:
        For each layer, its tensors by the last part of their names.

    Raises:
        CheckpointError: a layer lacks a tensor, or is stored unquantized, too.
    """
    layers: dict[str, _Layer] = {}
    for name in list(tensors):
        layer, _, part = name.rpartition(".")
        if part in {*required, *optional}:
            layers.setdefault(layer, {})[part] = tensors.pop(name)
    for layer, parts in layers.items():
        found = next(iter(parts.values()))
        for part in required:
            if part not in parts:
                raise layer_error(
                    found,
                    f"layer {layer} has no tensor {part}; the checkpoint is incomplete, download it again",
                )
        if f"{layer}.weight" in tensors:
            raise layer_error(found, f"layer {layer} is stored both quantized and as {layer}.weight")
    return layers


def layer_error(tensor: StoredTensor, message: str) -> CheckpointError:
    """Make an error that names the file of ``tensor``."""
    return CheckpointError(f"{tensor.path}: {message}")


def check_tensor(tensor: StoredTensor, shape: tuple[int, ...], dtypes: Iterable[str]) -> None:
    """Compare a tensor with what its layer asks for.

    Raises:
        CheckpointError: shape or dtype differs.
    """
    if tensor.shape != shape:
        raise layer_error(
            tensor, f"tensor {tensor.name} has shape {list(tensor.shape)}, its layer asks for {list(shape)}"
        )
    if tensor.dtype not in dtypes:
        raise layer_error(tensor, f"tensor {tensor.name} has dtype {tensor.dtype}, not {' or '.join(dtypes)}")


def matrix_shape(tensor: StoredTensor) -> tuple[int, int]:
    """Shape of a tensor with two axes.

    Raises:
        CheckpointError: it has another number of axes, or no elements.
    """
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        raise layer_error(
            tensor, f"tensor {tensor.name} of shape {list(tensor.shape)} is no matrix of weights"
        )
    return tensor.shape[0], tensor.shape[1]


def check_scales(tensor: StoredTensor, shape: tuple[int, int]) -> None:
    """Check that scales have their shape and a floating dtype."""
    check_tensor(tensor, shape, DTYPES)


def choose_block(layer: str, tensor: StoredTensor, inputs: int, groups: int) -> int:
    """Return the block size in which groups of scales are handed on.

    Raises:
        CheckpointError: no block size that runtimes know fits.
    """
    if groups == 1:
        for size in BLOCK_SIZES:
            if inputs % size == 0:
                return size
        raise layer_error(
            tensor, f"layer {layer} has {inputs} inputs, which none of the block sizes {BLOCK_SIZES} divides"
        )
    size, rest = divmod(inputs, groups)
    if rest or size < 16 or size & (size - 1):
        raise layer_error(
            tensor,
            f"layer {layer} has {inputs} inputs in {groups} groups; "
            "starkv reads groups of equal size, a power of two of at least 16",
        )
    return size


def group_order(layer: str, tensor: StoredTensor, groups: int) -> npt.NDArray[np.int64] | None:
    """Turn a ``g_idx`` [K], the group of each input, into an input order [K] that sorts inputs by group.

    Returns:
        The order, or None where inputs are sorted already.

    Raises:
        CheckpointError: groups are not of equal size.
    """
    index = tensor.array().astype(np.int64)
    size = len(index) // groups
    outside = index.min() < 0 or index.max() >= groups
    if outside or (np.bincount(index, minlength=groups) != size).any():
        raise layer_error(
            tensor, f"layer {layer}: {tensor.name} does not put {size} inputs into each of {groups} groups"
        )
    if (index[1:] >= index[:-1]).all():
        return None
    return np.argsort(index, kind="stable").astype(np.int64)
