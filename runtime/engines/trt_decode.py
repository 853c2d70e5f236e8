# SPDX-License-Identifier: Apache-2.0
"""A decode step of TensorRT: one upload, one graph, one small download.

Whatever the host knows of a step lies in one block, so that it goes to the card in one copy. The step's plan
is captured as a CUDA graph in its second run: lengths lie on the card, so one graph serves every length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.kernels.c_abi import KernelAbi
from starkv.manifest import Manifest
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.device_tensor import DeviceTensor
from starkv.runtime.generation import Draw
from starkv.trt_compat.running import ALIGNMENT, Execution

_DRAWS = ("temperature", "top_p", "uniform")


class UploadBlock:
    """Arrays of a step side by side: filled on the host, on the card after one copy."""

    def __init__(self, memory: CudaMemory, parts: dict[str, tuple[tuple[int, ...], Any]]) -> None:
        """Lay out the parts.

        Args:
            memory: of the card.
            parts: name → shape and dtype.
        """
        offsets, end = {}, 0
        for name, (shape, dtype) in parts.items():
            offsets[name] = end
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self._memory, self._block = memory, memory.block(end)
        self._host: NDArray[np.uint8] = memory.cuda.allocate_pinned((end,), np.uint8)
        self.host: dict[str, NDArray[Any]] = {}
        """Where to write what is uploaded next."""
        for name, (shape, dtype) in parts.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            part = self._host[offsets[name] : offsets[name] + size]
            self.host[name] = part.view(dtype).reshape(shape)
        self._offsets = offsets

    def address(self, name: str) -> int:
        """Of a part on the card."""
        return self._block.address + self._offsets[name]

    def upload(self) -> None:
        """Enqueue the copy."""
        self._memory.cuda.upload(self._block.address, self._host, self._memory.stream)


@dataclass(frozen=True)
class DecodeParts:
    """What the decode steps of an engine share."""

    execution: Execution
    memory: CudaMemory
    kernels: KernelAbi | None
    """Picks tokens on the card; without it logits come to the host."""
    manifest: Manifest


class TrtDecodeStep:
    """The step of one cache and number of sequences."""

    def __init__(self, parts: DecodeParts, kv: DeviceKv, batch: int) -> None:
        """Allocate what the step reads and writes.

        Args:
            parts: shared ones.
            kv: the cache; the step must not outlive it.
            batch: sequences, in the first slots.
        """
        text, memory = parts.manifest.text, parts.memory
        self._parts, self._batch, self._kv_shape = parts, batch, kv.shape
        self._keys, self._values = kv.keys, kv.values
        half = text.head_dim // 2
        layout: dict[str, tuple[tuple[int, ...], Any]] = {
            "inputs_embeds": ((batch, 1, text.hidden), np.float32),
            "rope_cos": ((batch, 1, half), np.float32),
            "rope_sin": ((batch, 1, half), np.float32),
            "kv_len": ((text.layers, batch), np.int32),
            "last_index": ((batch,), np.int32),
            **dict.fromkeys(_DRAWS, ((batch,), np.float32)),
        }
        self._inputs = UploadBlock(memory, layout)
        self._logits = memory.empty((batch, text.vocab), np.float32)
        self._ids = memory.empty((batch,), np.int32)
        self._host_ids: NDArray[np.int32] = memory.cuda.allocate_pinned((batch,), np.int32)
        self._host_logits: NDArray[np.float32] | None = None
        # Nobody reads these after a decode step, but they must go somewhere.
        self._unread: dict[str, DeviceTensor] = {
            "q_window": memory.empty((text.layers, batch, text.heads, 1, text.head_dim), kv.keys.dtype),
            "hidden_norm": memory.empty((text.layers, batch, 1), np.float32),
        }
        self._graph: Any | None = None
        self.runs = 0
        """Steps that were done."""

    def bind(self) -> None:
        """Give the context, which all steps share, this step's addresses and shapes."""
        execution, batch = self._parts.execution, self._batch
        for name in ("inputs_embeds", "rope_cos", "rope_sin", "kv_len", "last_index"):
            execution.bind(name, self._inputs.address(name), self._inputs.host[name].shape)
        execution.bind("logits", self._logits.address)
        for name, tensor in self._unread.items():
            execution.bind(name, tensor.address)
        bind_cache(execution, self._keys, self._values, batch)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def capture(self) -> None:
        """Record the plan's run, which must have run once before.

        Raises:
            EngineError: it can't be recorded.
        """
        cuda, stream = self._parts.memory.cuda, self._parts.memory.stream
        cuda.begin_capture(stream)
        try:
            self._parts.execution.enqueue()
        finally:
            graph = cuda.end_capture(stream)
        self._graph = graph

    def release(self) -> None:
        """Give the graph back."""
        if self._graph is not None:
            self._parts.memory.cuda.destroy_graph(self._graph)
            self._graph = None

    def logits(self, lengths: NDArray[np.int32], embeds: Floats, rope: Rope) -> Floats:
        """Append a row to each sequence; logits ``[B, vocab]`` on the host."""
        self._run(lengths, embeds, rope, ())
        if self._host_logits is None:
            self._host_logits = self._parts.memory.cuda.allocate_pinned(self._logits.shape, np.float32)
        memory = self._parts.memory
        memory.cuda.download(self._host_logits, self._logits.address, memory.stream)
        memory.cuda.synchronize(memory.stream)
        logits: Floats = self._host_logits.copy()
        return logits

    def tokens(
        self, lengths: NDArray[np.int32], embeds: Floats, rope: Rope, draws: Sequence[Draw]
    ) -> list[int]:
        """Append a row to each sequence and pick its next token on the card.

        Raises:
            EngineError: there is no library that picks.
        """
        kernels, memory = self._parts.kernels, self._parts.memory
        if kernels is None:
            raise EngineError("no libstarkv_kernels.so lies beside the engine: tokens are picked on the host")
        self._run(lengths, embeds, rope, draws)
        sizes = (self._batch, self._parts.manifest.text.vocab, memory.stream)
        if any(draw.temperature for draw in draws):
            chosen = [self._inputs.address(name) for name in _DRAWS]
            kernels.call("starkv_sample_top_p", self._logits.address, *chosen, self._ids.address, *sizes)
        else:
            kernels.call("starkv_argmax", self._logits.address, self._ids.address, *sizes)
        memory.cuda.download(self._host_ids, self._ids.address, memory.stream)
        memory.cuda.synchronize(memory.stream)
        return [int(token) for token in self._host_ids]

    def _run(self, lengths: NDArray[np.int32], embeds: Floats, rope: Rope, draws: Sequence[Draw]) -> None:
        host = self._inputs.host
        host["inputs_embeds"][:] = embeds[:, None]
        host["rope_cos"][:], host["rope_sin"][:] = rope.cos, rope.sin
        host["kv_len"][:] = lengths
        host["last_index"][:] = 0
        for name in _DRAWS:
            host[name][:] = [getattr(draw, name) for draw in draws] or 0.0
        self._inputs.upload()
        if self._graph is not None:
            self._parts.memory.cuda.launch(self._graph, self._parts.memory.stream)
        else:
            self._parts.execution.enqueue()
        self.runs += 1


def bind_cache(execution: Execution, keys: DeviceTensor, values: DeviceTensor, batch: int) -> None:
    """Bind the first slots of a cache ``[L, N, Hkv, C, D]`` as past and present."""
    layers, _, *rest = keys.shape
    for layer in range(layers):
        for kind, tensor in (("k", keys), ("v", values)):
            address = tensor.at(layer)
            execution.bind(f"past_{kind}.{layer}", address, (batch, *rest))
            execution.bind(f"present_{kind}.{layer}", address)


def cache_aliases(layers: int) -> dict[str, str]:
    """Output of the decoder → input whose memory it shares."""
    return {f"present_{kind}.{layer}": f"past_{kind}.{layer}" for layer in range(layers) for kind in "kv"}
