# SPDX-License-Identifier: Apache-2.0
"""A stream's state as one file, so that a session outlives its process."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from starkv.errors import EngineError, UsageError
from starkv.kv_packing.file import PACKING_NAME
from starkv.manifest import Manifest
from starkv.methods.star_kv_plan import StarKVProgress
from starkv.runtime.kv.parked import ParkedRows
from starkv.runtime.kv.policy import StarKVMemory
from starkv.runtime.stream import FrameInView, StreamState

FORMAT = "starkv session 2"
_MEMORY = ("mi_ema", "pattern_ema", "temperature")


def save_session(state: StreamState, manifest: Manifest, path: Path) -> None:
    """Write a session's state; beside and renamed, so that an older file survives a failure.

    Args:
        state: of the session.
        manifest: of the engine that made the rows.
        path: of the file.

    Raises:
        UsageError: the folder is missing or can't be written to.
    """
    tensors: dict[str, NDArray[Any]] = {}
    rows = state.rows
    every = zip(rows.keys, rows.values, rows.row_meta, rows.positions, strict=True)
    for layer, (keys, values, meta, positions) in enumerate(every):
        # Safetensors' numpy has no bfloat16; the bits are what counts.
        tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = _bits(keys), _bits(values)
        tensors[f"row_meta.{layer}"] = np.ascontiguousarray(meta)
        tensors[f"positions.{layer}"] = np.ascontiguousarray(positions)
    memory = state.memory
    if memory is not None:
        tensors |= {name: np.ascontiguousarray(getattr(memory, name)) for name in _MEMORY}
    facts = {
        "dtype": str(rows.keys[0].dtype),
        "layers": len(rows.keys),
        "text": state.text,
        "image_keys": [key.hex() for key in state.image_keys],
        "pending": list(state.pending),
        "next_position": state.next_position,
        "tokens": state.tokens,
        "frames": [[frame.number, frame.tokens] for frame in state.frames],
        "protect_order": list(state.protect_order),
        "evicted_tokens": state.evicted_tokens,
        "progress": asdict(memory.progress) if memory is not None else None,
    }
    metadata = {"format": FORMAT, "engine": engine_identity(manifest), "state": json.dumps(facts)}
    beside = path.with_name(path.name + ".part")
    try:
        save_file(tensors, beside, metadata)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"the session can't be written to {path}: {error}") from None


def load_session(path: Path, manifest: Manifest) -> StreamState:
    """Read what :func:`save_session` wrote.

    Raises:
        EngineError: the file is missing, damaged, or of another engine.
    """
    try:
        with safe_open(path, "np") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EngineError(f"{path} is no session of this version of starkv; start anew without it")
            if metadata.get("engine") != engine_identity(manifest):
                raise EngineError(
                    f"{path} was saved by another engine ({metadata.get('engine')}), not by "
                    f"{engine_identity(manifest)}; open it with that one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return _state(json.loads(metadata["state"]), tensors)
    except FileNotFoundError:
        raise EngineError(f"{path} is missing; check the path, or start without a saved session") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise EngineError(f"{path} is damaged ({error}); start anew without it") from None


def engine_identity(manifest: Manifest) -> str:
    """Names what must be the same for rows to mean the same: model, quantization, the cache's dtype and
    packing."""
    packing = manifest.files.get(PACKING_NAME, "")
    return f"{manifest.name} {manifest.quantization} {manifest.compute_dtype} {packing}".rstrip()


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else contiguous


def _state(facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> StreamState:
    dtype = np.dtype(ml_dtypes.bfloat16 if facts["dtype"] == "bfloat16" else facts["dtype"])
    layers = range(facts["layers"])
    rows = ParkedRows(
        tuple(tensors[f"keys.{layer}"].view(dtype) for layer in layers),
        tuple(tensors[f"values.{layer}"].view(dtype) for layer in layers),
        tuple(tensors[f"row_meta.{layer}"] for layer in layers),
        tuple(tensors[f"positions.{layer}"] for layer in layers),
    )
    memory = None
    if facts["progress"] is not None:
        memory = StarKVMemory(StarKVProgress(**facts["progress"]), *(tensors[name] for name in _MEMORY))
    return StreamState(
        rows=rows,
        text=facts["text"],
        image_keys=tuple(bytes.fromhex(key) for key in facts["image_keys"]),
        pending=tuple(facts["pending"]),
        next_position=facts["next_position"],
        tokens=facts["tokens"],
        frames=tuple(FrameInView(number, tokens) for number, tokens in facts["frames"]),
        protect_order=tuple(facts["protect_order"]),
        memory=memory,
        evicted_tokens=facts["evicted_tokens"],
    )
