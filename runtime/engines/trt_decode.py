# SPDX-License-Identifier: Apache-2.0
"""A decode step on TensorRT: inputs go to the card in one copy, a token per sequence comes back.

The plan's run is captured as a CUDA graph in the step's second run: lengths lie on the card, so one graph
serves every length. NVIDIA wants an execution context per captured graph, since whoever changes a context
later makes the graph undefined (developer guide of TensorRT, CUDA graphs): each step has its own. They share
the memory for activations.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.kernels.c_abi import KernelAbi
from starkv.manifest import Manifest
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.engines.cuda import Cuda
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.cuda_upload import UploadBlock
from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.device_tensor import DeviceTensor, numpy_dtype
from starkv.runtime.engines.trt_caches import DecoderCaches
from starkv.runtime.generation import Draw
from starkv.trt_compat.execution import Execution

_DRAWS = ("temperature", "top_p", "uniform")


@dataclass
class DecodeParts:
    """What the decode steps of an engine share."""

    new_execution: Callable[[], Execution]
    """Makes a context of the decoder's decode profile."""
    plain: Execution
    """One for all steps that are no graphs."""
    memory: CudaMemory
    kernels: KernelAbi | None
    """Picks tokens on the card; without it logits come to the host."""
    manifest: Manifest
    caches: DecoderCaches
    graphs: bool
    """Whether steps become CUDA graphs."""


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
        self._parts, self._batch, self._kv = parts, batch, weakref.ref(kv)
        # A graph's addresses must stay what they are.
        self._cache_memory = kv.tensors
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
        compute = numpy_dtype(parts.manifest.compute_dtype)
        self._unread: dict[str, DeviceTensor] = {
            "q_window": memory.empty((text.layers, batch, text.heads, 1, text.head_dim), compute),
            "hidden_norm": memory.empty((text.layers, batch, 1), np.float32),
        }
        self._execution: Execution | None = None
        self._graphs: list[Any] = []
        # Before the context and the memory go.
        weakref.finalize(self, _end, memory.cuda, memory.stream, self._graphs)

    def leave(self) -> None:
        """Make room for other steps; whoever wants this one again makes a new one."""
        if kv := self._kv():
            kv.steps.pop(self._batch, None)

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
        self._enqueue()

    def _enqueue(self) -> None:
        parts = self._parts
        if parts.graphs and not self._graphs and self._execution is not None:
            try:
                self._capture(self._execution)
            except EngineError:
                # What can't be recorded is launched kernel by kernel.
                parts.graphs = False
        if parts.graphs and self._graphs:
            parts.memory.cuda.launch(self._graphs[0], parts.memory.stream)
        elif parts.graphs:
            # A context has to run once before its run is captured.
            execution = parts.new_execution()
            self._bind(execution)
            execution.enqueue()
            self._execution = execution
        else:
            self._bind(parts.plain)
            parts.plain.enqueue()

    def _bind(self, execution: Execution) -> None:
        """Give a context this step's addresses and shapes."""
        for name in ("inputs_embeds", "rope_cos", "rope_sin", "kv_len", "last_index"):
            execution.bind(name, self._inputs.address(name), self._inputs.host[name].shape)
        execution.bind("logits", self._logits.address, self._logits.shape)
        for name, tensor in self._unread.items():
            execution.bind(name, tensor.address, tensor.shape)
        kv = self._kv()
        assert kv is not None, "a step does not outlive its cache"
        self._parts.caches.bind(execution, kv, self._batch)

    def _capture(self, execution: Execution) -> None:
        """Record the plan's run.

        Raises:
            EngineError: it can't be recorded.
        """
        cuda, stream = self._parts.memory.cuda, self._parts.memory.stream
        cuda.begin_capture(stream)
        try:
            execution.enqueue()
        except EngineError:
            # The stream must leave the capture all the same; what was recorded is no whole run.
            with suppress(EngineError):
                cuda.destroy_graph(cuda.end_capture(stream))
            raise
        self._graphs.append(cuda.end_capture(stream))


def _end(cuda: Cuda, stream: int, graphs: list[Any]) -> None:
    """Destroy a step's graph, once nothing runs that may be of it."""
    # A card that failed gives nothing back before the process ends.
    with suppress(EngineError):
        cuda.synchronize(stream)
        while graphs:
            cuda.destroy_graph(graphs.pop())
