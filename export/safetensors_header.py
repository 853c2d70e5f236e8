# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file and the index of a sharded checkpoint, checked before use."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from pydantic import BaseModel, NonNegativeInt, TypeAdapter, ValidationError

from starkv.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes of weights, as safetensors spells them."""

INTEGER_DTYPES: dict[str, np.dtype[Any]] = {
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""Dtypes of the tensors that make up a quantized layer."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LARGEST_HEADER = 100 << 20


class TensorHeader(BaseModel):
    """One tensor of a file; offsets count from the end of the header."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Index(BaseModel):
    weight_map: dict[str, str]


_HEADER = TypeAdapter(dict[str, TensorHeader])


def read_header(path: Path) -> tuple[dict[str, TensorHeader], int]:
    """Read and check a header.

    Returns:
        Tensors by name, and where their data begins.

    Raises:
        CheckpointError: the file is no safetensors file, is truncated, or holds something else than
            weights and integers.
    """
    damaged = CheckpointError(f"{path} is no safetensors file (its header is damaged); download it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise damaged
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated inside its header; download it again")
        raw = stream.read(length)
    try:
        fields = json.loads(raw)
        if isinstance(fields, dict):
            fields.pop("__metadata__", None)
        tensors = _HEADER.validate_python(fields)
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError):
        raise damaged from None
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, 8 + length, size)
    return tensors, 8 + length


def header_bytes(tensors: Mapping[str, tuple[str, Sequence[int]]], alignment: int = 8) -> bytes:
    """The beginning of a file whose tensors lie one behind the other.

    Args:
        tensors: dtype, as safetensors spells it, and shape of each, in order.
        alignment: the first tensor begins at a multiple of so many bytes.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(fields).encode()
    # Filling up with spaces is part of the format.
    header += b" " * (-(8 + len(header)) % alignment)
    return len(header).to_bytes(8, "little") + header


def _check_tensor(path: Path, name: str, tensor: TensorHeader, start: int, size: int) -> None:
    begin, end = tensor.data_offsets
    dtype = DTYPES.get(tensor.dtype) or INTEGER_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {tensor.dtype}; starkv reads {', '.join(DTYPES)} only"
        )
    if start + end > size:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, its header asks for {start + end}")
    if end - begin != math.prod(tensor.shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: tensor {name} has the wrong size for its shape; download it again")


def shard_paths(folder: Path) -> list[Path]:
    """Find the files with weights of a checkpoint, sorted by name.

    Raises:
        CheckpointError: there are none, the index is damaged, or it names a file that is missing.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise CheckpointError(
                f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; download the weights"
            )
        return [folder / SINGLE_NAME]
    try:
        shards = sorted(set(_Index.model_validate_json(index.read_bytes()).weight_map.values()))
    except ValidationError:
        raise CheckpointError(
            f"{index} is no readable index of safetensors shards; download it again"
        ) from None
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard} is missing although {INDEX_NAME} names it; download it again"
            )
    return [folder / shard for shard in shards]
