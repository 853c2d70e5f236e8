# SPDX-License-Identifier: Apache-2.0
"""Steps a decoder graph in ONNX Runtime with its cache bound in place, as the runtime does."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from starkv.manifest import TextShape

F32 = np.float32


def open_session(path: Path | bytes, config: dict[str, str] | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass
class StepResult:
    logits: np.ndarray
    """[B,V]."""
    q_window: np.ndarray
    """[L,B,Hq,min(W,S),D]."""
    hidden_norm: np.ndarray
    """[L,B,S]."""


class DecoderRunner:
    """Holds the cache, [B,Hkv,C,D] per layer; rows never written hold a huge value, so reading one shows."""

    def __init__(
        self,
        path: Path,
        shape: TextShape,
        batch: int = 1,
        capacity: int = 96,
        config: dict[str, str] | None = None,
    ) -> None:
        self.session = open_session(path, config)
        self.shape = shape
        cache = (batch, shape.kv_heads, capacity, shape.head_dim)
        names = [f"{kind}.{layer}" for layer in range(shape.layers) for kind in ("k", "v")]
        types = {entry.name: entry.type for entry in self.session.get_inputs()}
        dtype = np.float16 if types["past_k.0"] == "tensor(float16)" else F32
        # An OrtValue made from an array shares its memory, so the graph writes into these arrays.
        self.cache = {name: np.full(cache, 1e3, dtype) for name in names}
        self.kv_len = np.zeros((shape.layers, batch), np.int32)

    def step(
        self, embeds: np.ndarray, cos: np.ndarray, sin: np.ndarray, last_index: np.ndarray | None = None
    ) -> StepResult:
        """Run S new tokens, embeds [B,S,hidden], cos and sin [B,S,D/2]."""
        batch, new = embeds.shape[:2]
        if last_index is None:
            last_index = np.full(batch, new - 1)
        binding = self.session.io_binding()
        last_rows = self.kv_len + np.int32(new - 1)
        feeds = {
            "inputs_embeds": embeds.astype(F32),
            "rope_cos": cos.astype(F32),
            "rope_sin": sin.astype(F32),
            "kv_len": self.kv_len,
            "past_extent": np.zeros(int(self.kv_len.max()), np.int8),
            "last_index": last_index.astype(np.int32),
            # In place of kv_len and past_extent, in graphs lowered for ONNX Runtime.
            "last_rows": last_rows.reshape(-1),
            "longest": np.array([last_rows.max() + 1], np.int32),
        }
        taken = {entry.name for entry in self.session.get_inputs()}
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x))
            for name, x in feeds.items()
            if name in taken
        }
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        caches = {name: ort.OrtValue.ortvalue_from_numpy(rows) for name, rows in self.cache.items()}
        for name, value in caches.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        names = ("logits", "q_window", "hidden_norm")
        for name in names:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        self.kv_len = self.kv_len + np.int32(new)
        # Outputs come in the order of their binding: the cache first.
        return StepResult(*(value.numpy() for value in binding.get_outputs()[-len(names) :]))
