# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's decoder as PyTorch weights; those of the vision tower stay on the disk."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from starkv.errors import CheckpointError
from starkv.manifest import TextShape
from starkv.runtime.engines.torch_decoder import TorchDecoder, decoder_name, decoder_weights


def load_decoder(
    checkpoint: Path, text: TextShape, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TorchDecoder:
    """Read the decoder of a checkpoint.

    Args:
        checkpoint: folder with ``config.json`` and safetensors.
        text: sizes that it must have.
        dtype: of weights and activations.
        device: where the weights go, such as ``cuda``.

    Raises:
        CheckpointError: the checkpoint is damaged, or of other sizes.
    """
    return TorchDecoder(text, _norm_epsilon(checkpoint), _read_weights(checkpoint, text, device), dtype)


def _norm_epsilon(checkpoint: Path) -> float:
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
        return float(config.get("text_config", config)["rms_norm_eps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} gives no rms_norm_eps ({error!r}); is this the checkpoint?") from None


def _read_weights(checkpoint: Path, text: TextShape, device: str) -> dict[str, Tensor]:
    """The decoder's weights; those of the vision tower stay on the disk."""
    paths = sorted(checkpoint.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{checkpoint} holds no safetensors; check the path or download the model")
    needed, weights = decoder_weights(text), {}
    for path in paths:
        try:
            with safe_open(path, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    if decoder_name(name) in needed:
                        weights[name] = stored.get_tensor(name).to(device)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); download it again") from None
    return weights
