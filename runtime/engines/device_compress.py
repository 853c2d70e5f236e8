# SPDX-License-Identifier: Apache-2.0
"""KV compression of a cache that lies on a device.

STaR-KV runs there in one call of the kernels' library, where that is built. The other methods, and STaR-KV
without the library, run on the processor on a copy of the prompt's rows; what they keep is copied back, bit
for bit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.kernels.c_abi import (
    BFLOAT16,
    COMPRESS_OUTPUTS,
    COMPRESS_STATE,
    FLOAT16,
    FLOAT32,
    POOLINGS,
    CompressBuffers,
    CompressShape,
    KernelAbi,
    KernelError,
)
from starkv.kernels.library_paths import kernel_libraries
from starkv.manifest import ComputeDtype, Manifest
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_request import StarKVRequest
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

_DTYPES: dict[ComputeDtype, int] = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
_POOLING, _POOLING_KERNEL = POOLINGS["avgpool"], 5
"""As in ``compress.onnx``."""


def find_kernels(device: str) -> KernelAbi | None:
    """The kernels' library for ``cuda`` or ``cpu``, or None where none is built."""
    for path in kernel_libraries(device):
        try:
            library = KernelAbi(path)
        except KernelError:
            continue
        if library.device == device:
            return library
    return None


class DeviceCompressor(OrtCompressor):
    """Compresses the sequence of an arena into a slot of a pool, both on a device."""

    def __init__(
        self,
        manifest: Manifest,
        open_graph: Callable[[str], Any],
        memory: DeviceMemory,
        kernels: KernelAbi | None,
    ) -> None:
        """Graphs are opened when a method first needs them.

        Args:
            manifest: sizes and dtype.
            open_graph: makes the session of ``{name}.onnx`` on the processor.
            memory: of the device where the caches lie.
            kernels: the library for that device, if there is one.
        """
        super().__init__(manifest.text, manifest.observation_window, open_graph)
        self._memory, self._kernels = memory, kernels
        self._dtype = _DTYPES[manifest.compute_dtype]

    @property
    def on_device(self) -> bool:
        """Whether STaR-KV runs where the cache lies."""
        return self._kernels is not None

    def _copy_rows(self, arena: Arena, pool: Pool, slot: int, rows: int) -> None:
        copy_rows(device_kv(arena.kv), 0, device_kv(pool.kv), slot, rows)

    def _star_kv(
        self, arena: Arena, pool: Pool, slot: int, prompt: PromptRows, policy: KvPolicy, memory: StarKVMemory
    ) -> Compressed:
        if self._kernels is None:
            return self._on_host(super()._star_kv, arena, pool, slot, prompt, policy, memory)
        request, pattern = self._prepare_star_kv(arena, pool, prompt, policy, memory)
        target = device_kv(pool.kv)
        outputs, meta = self._launch(
            self._kernels, device_arena(arena), target, slot, request, pattern, memory
        )
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
        kernels: KernelAbi,
        arena: DeviceArena,
        target: DeviceKv,
        slot: int,
        request: StarKVRequest,
        pattern: NDArray[np.float32],
        memory: StarKVMemory,
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.int32]]:
        """One call for all layers: outputs by the operator's names, and the pool's ``row_meta``."""
        layers, _, groups, capacity, dim = arena.kv.shape
        shape = CompressShape(
            layers=layers,
            sequences=1,
            kv_heads=groups,
            query_heads=self._text.heads,
            window=request.window,
            head_dim=dim,
            capacity=capacity,
            slots=target.slots,
            slot_capacity=target.capacity,
            pattern_capacity=pattern.shape[-1],
            dtype=self._dtype,
            pooling=_POOLING,
            pooling_kernel=_POOLING_KERNEL,
        )
        tensors = {
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
        tensors |= {name: on_device(self._memory, array) for name, array in arrays.items()}
        results: dict[str, tuple[tuple[int, ...], Any]] = {
            "new_len": ((layers, 1), np.int32),
            "rows": ((layers, 1, 1, target.capacity), np.int64),
            "scores": ((layers, 1, capacity), np.float32),
            "stages": ((layers, 1, 4, capacity), np.float32),
            **{f"new_{name}": (arrays[name].shape, np.float32) for name in COMPRESS_STATE},
        }
        tensors |= {name: self._empty(*result) for name, result in results.items()}
        size = kernels.workspace_bytes(shape)
        workspace = self._empty((max(1, size),), np.uint8)
        buffers = CompressBuffers(**{name: tensor.address for name, tensor in tensors.items()})
        self._memory.device.synchronize()
        kernels.launch(shape, buffers, workspace.address, size)
        self._memory.device.synchronize()
        names = (*COMPRESS_OUTPUTS, *(f"new_{name}" for name in COMPRESS_STATE))
        return {name: tensors[name].read() for name in names}, tensors["dst_meta"].read()

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceTensor:
        return self._memory.empty(shape, dtype)

    def _window(self, arena: DeviceArena, window: int) -> DeviceTensor:
        """The last queries of the arena ``[L, 1, H, window, D]``."""
        queries = arena.last_queries
        layers, _, heads, held, dim = queries.shape
        if held == window:
            return queries
        width = dim * queries.dtype.itemsize
        last = self._empty((layers, 1, heads, window, dim), queries.dtype)
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
        prompt: PromptRows,
        policy: KvPolicy,
        memory: StarKVMemory | None,
    ) -> Compressed:
        """Compress a copy in host memory, then copy what is left of it into the slot."""
        most = self.most_rows(prompt.length, policy)
        check_room(most, pool)
        kept = Pool(KvBuffers.allocate(self._text, 1, most))
        on_host = device_arena(arena).on_host(self._text)
        result: Compressed = compress(on_host, kept, 0, prompt, policy, memory)
        target, rows = device_kv(pool.kv), int(kept.kv.lengths.max())
        target.write_rows(slot, kept.host_kv.keys[:, 0, :, :rows], kept.host_kv.values[:, 0, :, :rows])
        target.lengths[:, slot] = kept.kv.lengths[:, 0]
        target.row_meta[:, slot, :rows] = kept.kv.row_meta[:, 0, :rows]
        return result
