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

FORMAT = "starkv session 3"
_WAITING = "waiting."
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
    tensors = _tensors(state.rows, "")
    if state.waiting is not None:
        tensors |= _tensors(state.waiting, _WAITING)
    memory = state.memory
    if memory is not None:
        tensors |= {name: np.ascontiguousarray(getattr(memory, name)) for name in _MEMORY}
    facts = {
        "dtype": str(state.rows.keys[0].dtype),
        "waiting_dtype": None if state.waiting is None else str(state.waiting.keys[0].dtype),
        "layers": len(state.rows.keys),
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


def _tensors(rows: ParkedRows, prefix: str) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    every = zip(rows.keys, rows.values, rows.row_meta, rows.positions, strict=True)
    for layer, (keys, values, meta, positions) in enumerate(every):
        # Safetensors' numpy has no bfloat16; the bits are what counts.
        tensors[f"{prefix}keys.{layer}"], tensors[f"{prefix}values.{layer}"] = _bits(keys), _bits(values)
        tensors[f"{prefix}row_meta.{layer}"] = np.ascontiguousarray(meta)
        tensors[f"{prefix}positions.{layer}"] = np.ascontiguousarray(positions)
    return tensors


def _rows(tensors: Mapping[str, NDArray[Any]], prefix: str, layers: int, name: str) -> ParkedRows:
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return ParkedRows(
        tuple(tensors[f"{prefix}keys.{layer}"].view(dtype) for layer in range(layers)),
        tuple(tensors[f"{prefix}values.{layer}"].view(dtype) for layer in range(layers)),
        tuple(tensors[f"{prefix}row_meta.{layer}"] for layer in range(layers)),
        tuple(tensors[f"{prefix}positions.{layer}"] for layer in range(layers)),
    )


def _state(facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> StreamState:
    rows = _rows(tensors, "", facts["layers"], facts["dtype"])
    waiting = None
    if facts["waiting_dtype"] is not None:
        waiting = _rows(tensors, _WAITING, facts["layers"], facts["waiting_dtype"])
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
        waiting=waiting,
    )
