# SPDX-License-Identifier: Apache-2.0
"""Token embeddings, looked up on the host in a memory-mapped table.

A 7B model's table is over a gigabyte in fp16 and a step reads one row of it: it never enters a graph.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError

_TENSOR = "embedding"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class EmbeddingTable:
    """The tensor ``embedding`` ``[vocab, hidden]`` of a safetensors file."""

    def __init__(self, path: Path) -> None:
        """Map the table.

        Raises:
            EngineError: the file is missing, damaged, or holds another tensor.
        """
        try:
            with path.open("rb") as stream:
                header_bytes = int.from_bytes(stream.read(8), "little")
                entry = json.loads(stream.read(header_bytes))[_TENSOR]
            self._rows = np.memmap(
                path,
                _DTYPES[entry["dtype"]],
                "r",
                8 + header_bytes + entry["data_offsets"][0],
                tuple(entry["shape"]),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise EngineError(
                f"{path} holds no embedding table ({error!r}); build the engine again"
            ) from None

    def __call__(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Rows ``[S, hidden]`` as float32.

        Raises:
            EngineError: an id is outside the vocabulary.
        """
        ids = np.asarray(token_ids, np.int64)
        outside = ids[(ids < 0) | (ids >= len(self._rows))]
        if outside.size:
            raise EngineError(
                f"token id {outside[0]} is outside the embedding table of {len(self._rows)} rows"
            )
        return self._rows[ids].astype(np.float32)
