# SPDX-License-Identifier: Apache-2.0
"""``embedding.safetensors``: the token embedding, looked up by the host and therefore outside the graphs."""

import json
import math
from pathlib import Path

from starkv.export.checkpoint import Checkpoint

FILE_NAME = "embedding.safetensors"
TENSOR_NAME = "embedding"
_CHUNK_ROWS = 4096
_DTYPE_SIZES = {"BF16": 2, "F16": 2, "F32": 4}


def write_embedding(checkpoint: Checkpoint, name: str, directory: Path) -> None:
    """Copy the tensor ``name`` [vocab, hidden] row chunk by row chunk, in the checkpoint's dtype."""
    shape, dtype = checkpoint.shape(name), checkpoint.stored_dtype(name)
    size = math.prod(shape) * _DTYPE_SIZES[dtype]
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({TENSOR_NAME: entry}).encode()
    # Padding with spaces is part of the format; it puts the table at a multiple of 64 bytes for mapping.
    header += b" " * (-(8 + len(header)) % 64)
    with (directory / FILE_NAME).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for start in range(0, shape[0], _CHUNK_ROWS):
            stream.write(checkpoint.stored_rows(name, start, min(start + _CHUNK_ROWS, shape[0])).tobytes())
