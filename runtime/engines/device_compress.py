# SPDX-License-Identifier: Apache-2.0
"""KV compression of a cache that lies on a device.

STaR-KV runs there in one call, where something can run it. The other methods, and STaR-KV without that, run
on the processor on a copy of the prompt's rows; what they keep is copied back, bit for bit.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.kernels.c_abi import COMPRESS_OUTPUTS, COMPRESS_STATE
from starkv.manifest import Manifest
from starkv.methods.names import STAR_KV
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_request import StarKVRequest
from starkv.methods.stream_rows import CacheRows
from starkv.runtime.engines.device_kv import DeviceArena, DeviceKv, copy_rows, device_arena, device_kv
from starkv.runtime.engines.device_tensor import DeviceMemory, DeviceTensor, on_device
from starkv.runtime.engines.ort_compress import (
    OrtCompressor,
    check_room,
    star_kv_inputs,
    star_kv_result,
)
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory

Operands = dict[str, DeviceTensor]
"""Inputs and outputs of ``Compress`` by their names; outputs that alias an input are not named."""


class DeviceCompressor(OrtCompressor):
    """Compresses the sequence of an arena into a slot of a pool, both on a device."""

    def __init__(self, manifest: Manifest, open_graph: Callable[[str], Any], memory: DeviceMemory) -> None:
        """Graphs are opened when a method first needs them.

        Args:
            manifest: sizes and dtype.
            open_graph: makes the session of ``{name}.onnx`` on the processor.
            memory: of the device where the caches lie.
        """
        super().__init__(manifest.text, manifest.observation_window, open_graph)
        self._memory = memory

    @property
    @abstractmethod
    def on_device(self) -> bool:
        """Whether STaR-KV runs where the cache lies."""

    @abstractmethod
    def _run_compress(self, operands: Operands) -> None:
        """Run ``Compress`` on the device; the operands are there when it returns.

        Raises:
            StarkvError: it can't.
        """

    def _graphs_of(self, method: str) -> tuple[str, ...]:
        return () if method == STAR_KV and self.on_device else super()._graphs_of(method)

    def _copy_rows(self, arena: Arena, pool: Pool, slot: int, rows: int) -> None:
        # What is packed next stays where it is.
        if pool.kv is not arena.kv:
            copy_rows(device_kv(arena.kv), 0, device_kv(pool.kv), slot, rows)

    def _star_kv(
        self, arena: Arena, pool: Pool, slot: int, prompt: CacheRows, policy: KvPolicy, memory: StarKVMemory
    ) -> Compressed:
        if not self.on_device:
            return self._on_host(super()._star_kv, arena, pool, slot, prompt, policy, memory)
        request, pattern = self._prepare_star_kv(arena, pool, prompt, policy, memory)
        target = device_kv(pool.kv)
        outputs, meta = self._launch(device_arena(arena), target, slot, request, pattern, memory)
        result = star_kv_result(request, outputs, prompt.length)
        if not outputs["new_len"].all():
            raise EngineError(
                "the kernels refused to compress this cache: its lengths or frames make no sense"
            )
        target.lengths[:, slot] = outputs["new_len"][:, 0]
        target.row_meta[:, slot] = meta[:, slot]
        return result

    def _launch(
        self,
        arena: DeviceArena,
        target: DeviceKv,
        slot: int,
        request: StarKVRequest,
        pattern: NDArray[np.float32],
        memory: StarKVMemory,
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.int32]]:
        """One call for all layers: outputs by the operator's names, and the pool's ``row_meta``."""
        layers, _, _, capacity, _ = arena.kv.shape
        operands = {
            "k": arena.device_kv.keys,
            "v": arena.device_kv.values,
            "q_window": self._window(arena, request.window),
            "dst_k": target.keys,
            "dst_v": target.values,
        }
        arrays: dict[str, NDArray[Any]] = {
            **star_kv_inputs(arena, slot, request, pattern, memory),
            "dst_meta": target.row_meta,
        }
        operands |= {name: on_device(self._memory, array) for name, array in arrays.items()}
        results: dict[str, tuple[tuple[int, ...], Any]] = {
            "new_len": ((layers, 1), np.int32),
            "rows": ((layers, 1, 1, target.capacity), np.int64),
            "scores": ((layers, 1, capacity), np.float32),
            "stages": ((layers, 1, 4, capacity), np.float32),
            **{f"new_{name}": (arrays[name].shape, np.float32) for name in COMPRESS_STATE},
        }
        operands |= {name: self._memory.empty(*result) for name, result in results.items()}
        self._run_compress(operands)
        names = (*COMPRESS_OUTPUTS, *(f"new_{name}" for name in COMPRESS_STATE))
        return {name: operands[name].read() for name in names}, operands["dst_meta"].read()

    def _window(self, arena: DeviceArena, window: int) -> DeviceTensor:
        """The last queries of the arena ``[L, 1, H, window, D]``."""
        queries = arena.last_queries
        layers, _, heads, held, dim = queries.shape
        if held == window:
            return queries
        width = dim * queries.dtype.itemsize
        last = self._memory.empty((layers, 1, heads, window, dim), queries.dtype)
        self._memory.device.copy(
            last.address,
            window * width,
            queries.address + (held - window) * width,
            held * width,
            window * width,
            layers * heads,
        )
        return last

    def _baseline(
        self,
        arena: Arena,
        pool: Pool,
        slot: int,
        prompt: PromptRows,
        policy: KvPolicy,
        memory: StarKVMemory | None,
    ) -> Compressed:
        return self._on_host(super()._baseline, arena, pool, slot, prompt, policy, memory)

    def _on_host(
        self,
        compress: Callable[..., Compressed],
        arena: Arena,
        pool: Pool,
        slot: int,
        prompt: CacheRows,
        policy: KvPolicy,
        memory: StarKVMemory | None,
    ) -> Compressed:
        """Compress a copy in host memory, then copy what is left of it into the slot."""
        most = self.most_rows_of(prompt, policy)
        check_room(most, pool)
        kept = Pool(KvBuffers.allocate(self._text, 1, most))
        on_host = device_arena(arena).on_host(self._text)
        result: Compressed = compress(on_host, kept, 0, prompt, policy, memory)
        target, rows = device_kv(pool.kv), int(kept.kv.lengths.max())
        target.write_rows(slot, kept.host_kv.keys[:, 0, :, :rows], kept.host_kv.values[:, 0, :, :rows])
        target.lengths[:, slot] = kept.kv.lengths[:, 0]
        target.row_meta[:, slot, :rows] = kept.kv.row_meta[:, 0, :rows]
        return result
