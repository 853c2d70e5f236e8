# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of an engine's plans: names and types that the runtime reckons with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from starkv.errors import EngineError
from starkv.kernels.c_abi import COMPRESS_INPUTS, COMPRESS_OUTPUTS, COMPRESS_STATE
from starkv.kv_packing.quantized import SCALES, TABLES
from starkv.manifest import Manifest
from starkv.runtime.engines.device_tensor import numpy_dtype
from starkv.runtime.preprocess.vision_plan import plan_vision
from starkv.trt_compat.running import Plan

VISION, DECODER, COMPRESS = "vision", "decoder", "compress"
COMPRESS_ALIASES = {"new_k": "dst_k", "new_v": "dst_v", "new_meta": "dst_meta"}
"""Output of ``compress`` → input whose memory it shares."""
_CACHES = ("k", "v", "q_window", "dst_k", "dst_v", "new_k", "new_v")
_INT32 = ("kv_len", "row_meta", "frame", "slot", "dst_meta", "new_meta", "new_len")
_INT64 = ("limits", "rows")

FLOATS, CODES = ("k", "v"), ("k_codes", "v_codes")
"""Caches of the decoder."""

Types = Mapping[str, Any]


@dataclass(frozen=True)
class Tensors:
    """A plan's inputs and outputs with their types."""

    inputs: Types
    outputs: Types


def expected_tensors(manifest: Manifest) -> dict[str, Tensors]:
    """By plan: what ``export/lower/trt.py`` writes for such a model."""
    compute = numpy_dtype(manifest.compute_dtype)
    return {
        VISION: _vision(manifest),
        DECODER: _decoder(manifest, compute),
        COMPRESS: _compress(compute),
    }


def cache_aliases(manifest: Manifest) -> dict[str, str]:
    """Output of the decoder → input whose memory it shares."""
    return {**_aliases(manifest, FLOATS), **(_aliases(manifest, CODES) if _has_codes(manifest) else {})}


def _aliases(manifest: Manifest, kinds: tuple[str, str]) -> dict[str, str]:
    layers = range(manifest.text.layers)
    return {f"present_{kind}.{layer}": f"past_{kind}.{layer}" for layer in layers for kind in kinds}


def _has_codes(manifest: Manifest) -> bool:
    return manifest.tensorrt is not None and manifest.tensorrt.kv_bits is not None


def check_tensors(plan: Plan, expected: Tensors) -> None:
    """Refuse a plan whose inputs and outputs are others: it would compute with wrong numbers.

    Raises:
        EngineError: names the first that differs.
    """
    found = {(info.name, info.is_input): info.dtype for info in plan.tensors.values()}
    wanted = {
        (name, is_input): np.dtype(dtype)
        for is_input, types in ((True, expected.inputs), (False, expected.outputs))
        for name, dtype in types.items()
    }
    for key in [*wanted, *found]:
        if found.get(key) != wanted.get(key):
            name, is_input = key
            raise EngineError(
                f"{plan.name}: {'input' if is_input else 'output'} {name} is {found.get(key, 'missing')}, "
                f"expected {wanted.get(key, 'none of that name')}; another starkv built it, build it again"
            )


def _vision(manifest: Manifest) -> Tensors:
    merge = manifest.vision.spatial_merge_size
    # Which indices there are depends on the tower, not on the image.
    smallest = plan_vision(merge, merge, manifest.vision)
    types = {name: array.dtype for name, array in smallest.inputs().items()}
    return Tensors({"pixel_values": np.float32, **types}, {"image_embeds": np.float32})


def _decoder(manifest: Manifest, compute: Any) -> Tensors:
    floats = _aliases(manifest, FLOATS)
    inputs = {
        "inputs_embeds": np.float32,
        "rope_cos": np.float32,
        "rope_sin": np.float32,
        "kv_len": np.int32,
        "last_index": np.int32,
        **dict.fromkeys(floats.values(), compute),
    }
    outputs = {
        "logits": np.float32,
        "q_window": compute,
        "hidden_norm": np.float32,
        **dict.fromkeys(floats, compute),
    }
    if _has_codes(manifest):
        codes, layers = _aliases(manifest, CODES), range(manifest.text.layers)
        inputs |= {
            **dict.fromkeys(codes.values(), np.int32),
            **dict.fromkeys((f"row_positions.{layer}" for layer in layers), np.int32),
            **dict.fromkeys((f"{name}.{layer}" for layer in layers for name in SCALES), np.float32),
            **dict.fromkeys(TABLES, np.float32),
        }
        outputs |= dict.fromkeys(codes, np.int32)
    return Tensors(inputs, outputs)


def _compress(compute: Any) -> Tensors:
    types: dict[str, Any] = {
        **dict.fromkeys(_CACHES, compute),
        **dict.fromkeys(_INT32, np.int32),
        **dict.fromkeys(_INT64, np.int64),
    }
    outputs = (*COMPRESS_ALIASES, *COMPRESS_OUTPUTS, *(f"new_{name}" for name in COMPRESS_STATE))
    return Tensors(
        {name: types.get(name, np.float32) for name in COMPRESS_INPUTS},
        {name: types.get(name, np.float32) for name in outputs},
    )
