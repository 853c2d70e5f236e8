# SPDX-License-Identifier: Apache-2.0
"""Finds out how a checkpoint is quantized and takes its quantized layers out of its tensors."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starkv.errors import CheckpointError
from starkv.export.quantize.columns import ImportedQuantization
from starkv.export.quantize.imported import awq, compressed_tensors, gptq
from starkv.export.quantize.imported.common import READABLE, ImportedWeight
from starkv.export.stored_tensor import StoredTensor

_Read = Callable[[dict[str, StoredTensor]], dict[str, ImportedWeight]]

_READERS: dict[str, Callable[[dict[str, Any], Path], _Read]] = {
    "awq": awq.reader,
    "gptq": gptq.reader,
    "compressed-tensors": compressed_tensors.reader,
}


@dataclass(frozen=True)
class Importer:
    """Reads the quantized layers of one checkpoint."""

    path: Path
    """``config.json``, for messages."""
    method: str
    read: _Read

    def take(
        self, tensors: dict[str, StoredTensor]
    ) -> tuple[dict[str, ImportedWeight], ImportedQuantization]:
        """Take quantized layers out of ``tensors``.

        Returns:
            Weights by layer name, e.g. ``model.layers.0.mlp.up_proj``, and what they have in common.

        Raises:
            CheckpointError: a layer's tensors are incomplete or do not fit together, or there are none.
        """
        layers = self.read(tensors)
        if not layers:
            raise CheckpointError(
                f"{self.path}: quantization_config says {self.method}, but no tensor is quantized; "
                "remove it, or download the weights again"
            )
        schemes = Counter((layer.bits, layer.group_size) for layer in layers.values())
        (bits, group_size), _ = schemes.most_common(1)[0]
        return layers, ImportedQuantization(self.method, bits, group_size)


def choose_importer(config: dict[str, Any], path: Path) -> Importer | None:
    """Choose by ``quantization_config`` of the ``config.json`` at ``path``; None without one.

    Raises:
        CheckpointError: a method, format or number of bits that starkv does not read.
    """
    fields = config.get("quantization_config")
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: quantization_config is no JSON object; download it again")
    named = str(fields.get("quant_method", "an unknown method")).lower()
    if named in _READERS:
        return Importer(path, named, _READERS[named](fields, path))
    raise CheckpointError(
        f"{path}: weights quantized with {named} are not supported; starkv reads {READABLE}"
    )
