# SPDX-License-Identifier: Apache-2.0
"""``embedding.safetensors``: the token embedding, looked up by the host and therefore outside the graphs."""

from pathlib import Path

from starkv.export.checkpoint import Checkpoint
from starkv.export.safetensors_header import header_bytes

FILE_NAME = "embedding.safetensors"
TENSOR_NAME = "embedding"
_CHUNK_ROWS = 4096


def write_embedding(checkpoint: Checkpoint, name: str, directory: Path) -> None:
    """Copy the tensor ``name`` [vocab, hidden] row chunk by row chunk, in the checkpoint's dtype."""
    shape, dtype = checkpoint.shape(name), checkpoint.stored_dtype(name)
    # A multiple of 64 bytes, for mapping.
    header = header_bytes({TENSOR_NAME: (dtype, shape)}, alignment=64)
    with (directory / FILE_NAME).open("wb") as stream:
        stream.write(header)
        for start in range(0, shape[0], _CHUNK_ROWS):
            stream.write(checkpoint.stored_rows(name, start, min(start + _CHUNK_ROWS, shape[0])).tobytes())
