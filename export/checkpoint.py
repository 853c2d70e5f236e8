# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint folder: ``config.json`` and safetensors, mapped lazily and read in row chunks."""

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from starkv.errors import CheckpointError
from starkv.export.models.families import family_of
from starkv.export.quantize.columns import ImportedQuantization, PackedWeight
from starkv.export.safetensors_header import DTYPES, read_header, shard_paths

# Several spellings are in use: the Hub's older files drop a prefix that transformers writes today; OpenCUA has
# names of its own.
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


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies inside a mapped file."""

    mapping: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """Tensors of a checkpoint by canonical name, never more of them in memory than the caller asks for.

    Raises:
        CheckpointError: the folder, its ``config.json`` or a shard is missing, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint folder {folder} does not exist; check the path or download the model"
            )
        self.folder = folder
        self.config = _read_config(folder / "config.json")
        self.family = family_of(self.config, folder / "config.json")
        _refuse_quantized(self.config, folder / "config.json")
        self.quantization: ImportedQuantization | None = None
        self._entries: dict[str, _Entry] = {}
        self._mappings: list[mmap.mmap] = []
        for path in shard_paths(folder):
            self._map(path)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files; arrays handed out stay valid because they are copies."""
        self._entries.clear()
        for mapping in self._mappings:
            mapping.close()
        self._mappings.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Canonical names of all tensors, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored."""
        return self._entry(name).shape

    def stored_dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it: ``BF16``, ``F16`` or ``F32``."""
        return self._entry(name).dtype

    @property
    def parameters(self) -> int:
        """Number of stored weights; a tied head counts once."""
        return sum(math.prod(entry.shape) for entry in self._entries.values())

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """Read a whole tensor as float32."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Read the rows ``start … stop-1`` of the first axis as float32 [stop-start, …]."""
        return self.stored_rows(name, start, stop).astype(np.float32, copy=False)

    def stored_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Read rows of the first axis in the stored dtype and let go of the file's pages."""
        entry = self._entry(name)
        dtype = DTYPES[entry.dtype]
        row_size = math.prod(entry.shape[1:])
        first = entry.offset + start * row_size * dtype.itemsize
        count = (stop - start) * row_size
        view = np.frombuffer(entry.mapping, dtype, count, first)
        copied: npt.NDArray[Any] = view.reshape(stop - start, *entry.shape[1:]).copy()
        del view
        _drop_pages(entry.mapping, first, count * dtype.itemsize)
        return copied

    def packed(self, name: str) -> PackedWeight | None:
        """The weight as integers, if the checkpoint stores it so."""
        return None

    def input_divisors(self, norm: str) -> None:
        """Nothing: a checkpoint's weights are as the model has them."""
        return None

    def row_chunks(self, name: str, chunk: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first row, rows as float32) with at most ``chunk`` rows each."""
        total = self.shape(name)[0]
        for start in range(0, total, chunk):
            yield start, self.rows(name, start, min(start + chunk, total))

    def _entry(self, name: str) -> _Entry:
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
            self._entries[canonical_name(name)] = _Entry(mapping, offset, tensor.shape, tensor.dtype)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder is no Hugging Face checkpoint") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return config


def _refuse_quantized(config: dict[str, Any], path: Path) -> None:
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{path}: already quantized ({method}); use the original checkpoint, starkv quantizes itself"
        )


def _drop_pages(mapping: mmap.mmap, offset: int, length: int) -> None:
    """Let the kernel forget these bytes, so that reading a model keeps little of it resident."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = offset - offset % mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, start, offset + length - start)
