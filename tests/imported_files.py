# SPDX-License-Identifier: Apache-2.0
"""Writes linear layers as the quantization tools do, one integer after the other, from their documentation.

Everywhere: K inputs, N outputs, G groups; codes q [K,N] and zero points z [G,N] are unsigned, scales s [G,N].
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

# Columns of eight in the order in which AutoAWQ's kernel finds them in a word, lowest bits first.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class RandomLayer:
    """A layer as a quantizer leaves it; ``group_of`` [K] is the group of each input."""

    bits: int
    q: np.ndarray
    z: np.ndarray
    s: np.ndarray
    group_of: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """[N,K] in float32."""
        z, s = self.z.astype(np.float32), self.s.astype(np.float32)
        return ((self.q.astype(np.float32) - z[self.group_of]) * s[self.group_of]).T


def random_layer(
    inputs: int,
    outputs: int,
    groups: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    shuffled: bool = False,
    dtype: Any = np.float16,
    seed: int = 0,
) -> RandomLayer:
    """Draw codes and zero points from their range, but no zero point of 0: GPTQ's first format has none."""
    random = np.random.default_rng(seed)
    q = random.integers(0, 2**bits, (inputs, outputs))
    z = random.integers(1, 2**bits, (groups, outputs))
    if symmetric:
        z[:] = 2 ** (bits - 1)
    s = random.uniform(1e-3, 2e-2, (groups, outputs)).astype(dtype)
    group_of = np.repeat(np.arange(groups), inputs // groups)
    if shuffled:
        random.shuffle(group_of)
    return RandomLayer(bits, q, z, s, group_of)


def pack(values: np.ndarray, bits: int, columns: tuple[int, ...] | None = None) -> np.ndarray:
    """Pack the last axis of unsigned integers into words, padded with zeros."""
    fields = 32 // bits
    words = np.zeros((*values.shape[:-1], -(-values.shape[-1] // fields)), np.uint32)
    for index in range(values.shape[-1]):
        position = (columns or range(fields)).index(index % fields)
        words[..., index // fields] += values[..., index].astype(np.uint32) << np.uint32(position * bits)
    return words.view(np.int32)


def awq_gemm(layer: RandomLayer) -> Tensors:
    return {
        "qweight": pack(layer.q, 4, AWQ_COLUMNS),
        "qzeros": pack(layer.z, 4, AWQ_COLUMNS),
        "scales": layer.s,
    }


def awq_gemv(layer: RandomLayer) -> Tensors:
    groups, inputs = len(layer.z), len(layer.q)
    width = {128: 1, 64: 2, 32: 4}.get(inputs // groups, 1)
    words = -(-groups // 8)
    words = -(-words // width) * width
    padding = ((0, 0), (0, words * 8 - groups))
    return {
        "qweight": pack(layer.q.T, 4),
        "qzeros": pack(np.pad(layer.z.T, padding), 4),
        "scales": np.pad(layer.s.T, padding),
    }


def gptq(layer: RandomLayer, *, second: bool = False) -> Tensors:
    """``second``: format gptq_v2, which stores zero points as they are."""
    return {
        "qweight": pack(layer.q.T, layer.bits).T,
        "qzeros": pack(layer.z - (0 if second else 1), layer.bits),
        "scales": layer.s,
        "g_idx": layer.group_of.astype(np.int32),
    }


def compressed(layer: RandomLayer, *, symmetric: bool = False, unpacked_zero_points: bool = False) -> Tensors:
    """``unpacked_zero_points``: signed bytes, as compressed-tensors before 0.9.4 wrote them."""
    tensors = {
        "weight_packed": pack(layer.q.T, layer.bits),
        "weight_scale": layer.s.T,
        "weight_shape": np.array(layer.q.T.shape, np.int64),
    }
    if unpacked_zero_points:
        tensors["weight_zero_point"] = (layer.z.T - 2 ** (layer.bits - 1)).astype(np.int8)
    elif not symmetric:
        # Packed along the outputs: [N/fields, G].
        tensors["weight_zero_point"] = pack(layer.z, layer.bits).T
    if (np.diff(layer.group_of) < 0).any():
        tensors["weight_g_idx"] = layer.group_of.astype(np.int32)
    return tensors


def awq_config(group_size: int, version: str = "gemm") -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": version,
        "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }


def gptq_config(group_size: int, bits: int = 4, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False} | fields


def compressed_config(
    group_size: int, bits: int = 4, symmetric: bool = False, **fields: Any
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:visual.*"],
    } | fields


def write_checkpoint(
    folder: Path,
    quantization: dict[str, Any] | None,
    layers: dict[str, Tensors],
    plain: Tensors | None = None,
) -> Path:
    """Write a checkpoint folder with these layers, and ``plain`` tensors by full name."""
    config: dict[str, Any] = {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{layer}.{part}": array for layer, parts in layers.items() for part, array in parts.items()}
    plain = {"lm_head.weight": np.ones((3, 4), ml_dtypes.bfloat16)} if plain is None else plain
    # The library writes the memory of a transposed array as it lies.
    tensors = {name: np.ascontiguousarray(array) for name, array in (tensors | plain).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
