# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint folder: ``config.json`` and safetensors, mapped lazily and read in row chunks."""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from starkv.errors import CheckpointError
from starkv.export.json_file import read_json_object
from starkv.export.models.families import family_of
from starkv.export.quantize.columns import ImportedQuantization, PackedWeight
from starkv.export.quantize.imported.common import ImportedWeight, dequantize_rows
from starkv.export.quantize.imported.importer import choose_importer
from starkv.export.safetensors_header import DTYPES, read_header, shard_paths
from starkv.export.stored_tensor import StoredTensor

# Several spellings are in use: the Hub's older files drop a prefix that transformers writes today; OpenCUA
# has names of its own.
_OLD_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.visual."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
)


def canonical_name(name: str) -> str:
    """Spell a tensor's name as transformers does today: ``model.language_model.…``, ``model.visual.…``."""
    for old, new in _OLD_PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


class Checkpoint:
    """Tensors of a checkpoint by canonical name, never more of them in memory than the caller asks for.

    A layer that is stored quantized appears as its one ``….weight``, like any other.

    Raises:
        CheckpointError: the folder, its ``config.json`` or a shard is missing, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint folder {folder} does not exist; check the path or download the model"
            )
        self.folder = folder
        self.config = read_json_object(folder / "config.json", "the folder is no Hugging Face checkpoint")
        self.family = family_of(self.config, folder / "config.json")
        importer = choose_importer(self.config, folder / "config.json")
        self.quantization: ImportedQuantization | None = None
        """How the checkpoint is quantized, if it is."""
        self._entries: dict[str, StoredTensor] = {}
        self._packed: dict[str, ImportedWeight] = {}
        self._mappings: list[mmap.mmap] = []
        for path in shard_paths(folder):
            self._map(path)
        if importer is not None:
            layers, self.quantization = importer.take(self._entries)
            self._packed = {f"{layer}.weight": weight for layer, weight in layers.items()}
            _check_embedding(self._packed, folder)
        for entry in self._entries.values():
            _check_dtype(entry)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files; arrays handed out stay valid because they are copies."""
        self._entries.clear()
        self._packed.clear()
        for mapping in self._mappings:
            mapping.close()
        self._mappings.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._packed

    def names(self) -> list[str]:
        """Canonical names of all tensors, sorted."""
        return sorted([*self._entries, *self._packed])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; [N, K] of a linear layer's weight, however it is stored."""
        return self._packed[name].shape if name in self._packed else self._entry(name).shape

    def stored_dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it; ``I4`` or ``I8`` of a quantized layer."""
        return f"I{self._packed[name].bits}" if name in self._packed else self._entry(name).dtype

    @property
    def parameters(self) -> int:
        """Number of weights; a tied head counts once, and so does a quantized weight without its scales."""
        return sum(math.prod(self.shape(name)) for name in self.names())

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """Read a whole tensor as float32."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Read the rows ``start … stop-1`` of the first axis as float32 [stop-start, …]."""
        if name in self._packed:
            return dequantize_rows(self._packed[name], start, stop)
        return self.stored_rows(name, start, stop).astype(np.float32, copy=False)

    def stored_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows of the first axis of a tensor that is not quantized, in the stored dtype."""
        return self._entry(name).rows(start, stop)

    def packed(self, name: str) -> PackedWeight | None:
        """The weight as integers, if the checkpoint stores it so."""
        return self._packed.get(name)

    def input_divisors(self, norm: str) -> None:
        """Nothing: a checkpoint's weights are as the model has them."""
        return None

    def row_chunks(self, name: str, chunk: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first row, rows as float32) with at most ``chunk`` rows each."""
        total = self.shape(name)[0]
        for start in range(0, total, chunk):
            yield start, self.rows(name, start, min(start + chunk, total))

    def _entry(self, name: str) -> StoredTensor:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete, download it again"
            ) from None

    def _map(self, path: Path) -> None:
        tensors, start = read_header(path)
        with path.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._mappings.append(mapping)
        for name, tensor in tensors.items():
            offset = start + tensor.data_offsets[0]
            entry = StoredTensor(path, name, mapping, offset, tensor.shape, tensor.dtype)
            self._entries[canonical_name(name)] = entry


def _check_embedding(packed: dict[str, ImportedWeight], folder: Path) -> None:
    """Refuse a quantized embedding: its rows are looked up, not multiplied."""
    for name in packed:
        if name.endswith("embed_tokens.weight"):
            raise CheckpointError(
                f"{folder}: the embedding {name} is quantized; starkv reads quantized linear layers only"
            )


def _check_dtype(entry: StoredTensor) -> None:
    """Refuse integers that belong to no quantized layer."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} has dtype {entry.dtype}; "
            f"starkv reads {', '.join(DTYPES)} only, and integers of layers that quantization_config declares"
        )
