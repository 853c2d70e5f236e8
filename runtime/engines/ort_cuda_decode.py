# SPDX-License-Identifier: Apache-2.0
"""A decode step on a device: everything stays bound, and on a GPU the step becomes one CUDA graph.

ONNX Runtime's conditions for graphs, as its sources of 1.31 say: every node runs on the GPU and none copies
from or to the host, inputs and outputs keep their addresses and shapes, and a number (``gpu_graph_id``) tells
one graph from another. GroupQueryAttention reads the longest sequence's rows from host memory, so a graph
remembers that number; as an upper bound (the capacity) it does no harm, and each sequence's length lies on
the device.
"""

from typing import Any

import numpy as np

from starkv.manifest import Manifest
from starkv.runtime.engines.base import Floats, Rope
from starkv.runtime.engines.device_kv import DeviceKv
from starkv.runtime.engines.device_tensor import DeviceTensor, on_device
from starkv.runtime.engines.ort_cuda_tensor import OrtMemory, bind_part
from starkv.runtime.kv.buffers import KvStore


class DeviceDecodeStep:
    """A decode step of one cache and batch size."""

    def __init__(
        self,
        memory: OrtMemory,
        session: Any,
        kv: DeviceKv,
        batch: int,
        manifest: Manifest,
        options: Any,
    ) -> None:
        """Bind everything.

        Args:
            memory: of the device where it runs.
            session: of the decoder.
            kv: the cache; the step must not outlive it.
            batch: sequences, in the first slots.
            manifest: sizes.
            options: of each run, with the number of its CUDA graph.
        """
        text = manifest.text
        half = text.head_dim // 2

        def empty(shape: tuple[int, ...], dtype: Any = np.float32) -> DeviceTensor:
            return memory.empty(shape, dtype)

        self.session, self._batch, self._options = session, batch, options
        self.runs = 0
        """Steps that were done."""
        self._embeds, self._logits = empty((batch, 1, text.hidden)), empty((batch, text.vocab))
        self._cos, self._sin = empty((batch, 1, half)), empty((batch, 1, half))
        self._last_rows = empty((text.layers * batch,), np.int32)
        last_index = on_device(memory, np.zeros(batch, np.int32))
        # In host memory on every device. The capacity bounds all lengths and never changes.
        self._longest = memory.ort.OrtValue.ortvalue_from_numpy(np.array([kv.capacity], np.int32))
        self._binding = session.io_binding()
        bind_device_cache(self._binding, kv, batch)
        for name, tensor in (
            ("inputs_embeds", self._embeds),
            ("rope_cos", self._cos),
            ("rope_sin", self._sin),
            ("last_rows", self._last_rows),
            ("last_index", last_index),
        ):
            self._binding.bind_ortvalue_input(name, tensor.owner)
        self._binding.bind_ortvalue_input("longest", self._longest)
        self._binding.bind_ortvalue_output("logits", self._logits.owner)
        # Nobody reads these after a decode step, but a graph must know where they go.
        self._unread = {
            "q_window": empty((text.layers, batch, text.heads, 1, text.head_dim), kv.keys.dtype),
            "hidden_norm": empty((text.layers, batch, 1)),
        }
        for name, tensor in self._unread.items():
            self._binding.bind_ortvalue_output(name, tensor.owner)

    def run(self, kv: KvStore, embeds: Floats, rope: Rope) -> Floats:
        """Append a row to each of the first slots; returns logits ``[B, vocab]``."""
        lengths = kv.lengths[:, : self._batch]
        for tensor, array in (
            (self._embeds, embeds[:, None]),
            (self._cos, rope.cos),
            (self._sin, rope.sin),
            # The one new row of each sequence comes behind its valid ones.
            (self._last_rows, lengths.reshape(-1)),
        ):
            tensor.write(array)
        self.session.run_with_iobinding(self._binding, self._options)
        lengths += 1
        self.runs += 1
        return self._logits.read()


def bind_device_cache(binding: Any, kv: DeviceKv, batch: int) -> None:
    """Bind the first slots of a cache as past and present."""
    layers, _, *rest = kv.shape
    for layer in range(layers):
        for kind, buffer in (("k", kv.keys), ("v", kv.values)):
            for bind, name in ((binding.bind_input, "past"), (binding.bind_output, "present")):
                bind_part(buffer, bind, f"{name}_{kind}.{layer}", (batch, *rest), buffer.at(layer))
