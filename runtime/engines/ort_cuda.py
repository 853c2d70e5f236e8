# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime engine on a GPU: keys, values and activations in 16 bits stay in its memory.

Only embeddings and lengths go there and logits come back in a decode step. With ``device="cpu"`` the same
code runs on the processor, for tests; for use there is the engine of ``ort.py``.
"""

import sys
import weakref
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from starkv.errors import EngineError
from starkv.host import cpu_model
from starkv.methods.names import ENGINE_METHODS, FULL
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method, kv_bytes_per_row
from starkv.runtime.engines.cuda_driver import CudaDevice
from starkv.runtime.engines.device_kv import DeviceArena, DeviceKv, device_arena, device_kv
from starkv.runtime.engines.device_tensor import Device, HostDevice, numpy_dtype, on_device
from starkv.runtime.engines.kernel_compress import KernelCompressor, find_kernels
from starkv.runtime.engines.ort_base import CPU_PROVIDER, OrtBase, Providers
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.engines.ort_cuda_decode import DeviceDecodeStep, bind_device_cache
from starkv.runtime.engines.ort_cuda_gpu import CUDA_PROVIDER, usable_gpu
from starkv.runtime.engines.ort_cuda_tensor import OrtMemory
from starkv.runtime.engines.stepping import store_norms
from starkv.runtime.kv.buffers import Arena, Pool

PREFILL_CHUNK = 2048
"""Rows per prefill call: enough to fill a GPU, and a bound for the memory of activations."""
POOL_STEP = 512
"""Capacities of pools are multiples of this, so that their memory, and a CUDA graph on it, is used again."""
SPARE_POOLS = 2
"""Pools whose memory is kept for the next of the same size."""
MOST_GRAPHS = 32
"""ONNX Runtime keeps a CUDA graph as long as its session; further steps run without."""
_UNCAPTURED = "-1"


class OrtDeviceEngine(OrtBase):
    """Runs an engine directory that ``starkv build --device cuda`` made."""

    def __init__(
        self, directory: Path, verify: bool = True, threads: int | None = None, device: str = "cuda"
    ) -> None:
        """Open an engine directory.

        Args:
            directory: the engine.
            verify: compare every file with its recorded hash first.
            threads: intra-op threads of what runs on the processor.
            device: ``cuda``, or ``cpu`` for tests.

        Raises:
            EngineError: the directory is damaged or built for something else, there is no GPU or it lacks the
                engine's dtype, or onnxruntime-gpu is missing or can't use it.
        """
        super().__init__(directory, verify, threads)
        self._gpu = usable_gpu(self._manifest, directory, self._ort) if device == "cuda" else None
        if self._gpu:
            # CUDA's libraries from their Python packages; what it says about missing ones is no result.
            with redirect_stdout(sys.stderr):
                self._ort.preload_dlls()
        self._device: Device = CudaDevice() if self._gpu else HostDevice()
        self._memory = OrtMemory(self._ort, self._device)
        self._dtype = numpy_dtype(self._manifest.compute_dtype)
        self._vision_session = self._open("vision")
        self._graphs = self._gpu is not None
        self._decoder = self._open_decoder()
        self._captured = 0
        self._spare: list[DeviceKv] = []
        self._plain = self._run_options(gpu_graph_id=_UNCAPTURED)
        shrink = "gpu:0" if self._gpu else "cpu:0"
        self._shrinking = self._run_options(memory__enable_memory_arena_shrinkage=shrink)
        self._device_compressor = KernelCompressor(
            self._manifest,
            self._open_host_graph,
            self._memory,
            find_kernels(self._device.name),
        )

    def _open(self, graph: str, **options: str) -> Any:
        providers: Providers = (CPU_PROVIDER,)
        if self._gpu:
            # Memory in the sizes that are asked for: doubling arenas would waste gigabytes.
            cuda = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested", **options}
            providers = ((CUDA_PROVIDER, cuda), CPU_PROVIDER)
        entries = {"session.use_device_allocator_for_initializers": "1"}
        session = self._load(f"{graph}.onnx", providers, entries)
        if self._gpu and CUDA_PROVIDER not in session.get_providers():
            raise EngineError(
                f"onnxruntime-gpu {self._ort.__version__} can't use {self._gpu.name}: its CUDA libraries "
                "don't load; pip install 'starkv[cuda]' brings them"
            )
        return session

    def _open_decoder(self) -> Any:
        if self._graphs:
            try:
                return self._check_decoder(self._open("decoder", enable_cuda_graph="1"))
            except EngineError:
                # Some node can't be captured. Without graphs a step costs a launch for each of its kernels.
                self._graphs = False
        return self._check_decoder(self._open("decoder"))

    @property
    def info(self) -> EngineInfo:
        dtype = self._manifest.compute_dtype
        return EngineInfo(
            backend=f"ort-{self._device.name}",
            device=self._gpu.name if self._gpu else cpu_model(),
            compute_dtype=dtype,
            kv_dtype=dtype,
            kv_bytes_per_row=kv_bytes_per_row(self._manifest),
            kv_methods=ENGINE_METHODS,
            threads=self._threads,
            loaded_form="portable",
        )

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        return self._graphs

    def stop_capturing(self) -> None:
        """Run the steps of new pools without CUDA graphs, to compare."""
        self._captured, self._spare = MOST_GRAPHS, []

    @property
    def compresses_on_device(self) -> bool:
        """Whether STaR-KV runs where the cache lies, and not on the processor."""
        return self._device_compressor.on_device

    @property
    def _vision(self) -> Any:
        return self._vision_session

    @property
    def _vision_run(self) -> Any:
        return self._shrinking

    @property
    def _last_run(self) -> Any:
        # A CUDA graph goes on using the memory that it was captured with, which shrinking would give back.
        return self._plain if self._graphs else self._shrinking

    @property
    def _chunk(self) -> int:
        return PREFILL_CHUNK

    @property
    def _compressor(self) -> OrtCompressor:
        return self._device_compressor

    def new_arena(self, rows: int) -> Arena:
        self._check_rows(rows)
        kv = DeviceKv.allocate(self._memory, self._manifest.text, 1, rows, self._dtype)
        return DeviceArena.around(kv, self._manifest.text)

    def new_pool(self, slots: int, rows: int, method: str = FULL, packed: bool = False) -> Pool:
        check_kv_method(self.info, method, packed)
        self._check_rows(rows)
        rows = -(-rows // POOL_STEP) * POOL_STEP
        fitting = [kv for kv in self._spare if (kv.slots, kv.capacity) == (slots, rows)]
        if fitting:
            kv = fitting[0]
            self._spare = [other for other in self._spare if other is not kv]
        else:
            kv = DeviceKv.allocate(self._memory, self._manifest.text, slots, rows, self._dtype)
        pool = Pool(kv)
        # A pool that nobody uses any more leaves its memory, and what is bound to it, to the next.
        weakref.finalize(pool, _recycle, weakref.ref(self), kv)
        return pool

    def keep_spare(self, kv: DeviceKv) -> None:
        """Keep memory for the next pool of its size; the oldest of too many is given up."""
        kv.forget()
        self._spare = [*self._spare, kv][-SPARE_POOLS:]

    def _prefill_chunk(self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, last: bool) -> None:
        own = device_arena(arena)
        lengths, rows = arena.kv.lengths, embeds.shape[1]
        last_rows = lengths + np.int32(rows - 1)
        binding = self._decoder.io_binding()
        bind_device_cache(binding, own.device_kv, batch=1)
        inputs = {
            "inputs_embeds": embeds,
            "rope_cos": rope.cos,
            "rope_sin": rope.sin,
            "last_rows": last_rows.reshape(-1),
            "last_index": np.full(1, rows - 1, np.int32),
        }
        tensors = {name: on_device(self._memory, array) for name, array in inputs.items()}
        for name, tensor in tensors.items():
            binding.bind_ortvalue_input(name, tensor.owner)
        longest = np.array([last_rows.max() + 1], np.int32)
        binding.bind_ortvalue_input("longest", self._ort.OrtValue.ortvalue_from_numpy(longest))
        text = self._manifest.text
        window = min(rows, self._manifest.observation_window)
        shape = (text.layers, 1, text.heads, window, text.head_dim)
        own.queries = self._memory.empty(shape, self._dtype)
        binding.bind_ortvalue_output("q_window", own.queries.owner)
        norms = self._memory.empty((text.layers, 1, rows), np.float32)
        binding.bind_ortvalue_output("hidden_norm", norms.owner)
        result = self._memory.empty(logits.shape, np.float32)
        binding.bind_ortvalue_output("logits", result.owner)
        self._decoder.run_with_iobinding(binding, self._last_run if last else self._plain)
        logits[:] = result.read()
        store_norms(arena, norms.read(), rows)
        lengths += rows

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        self._start_decode(pool, embeds, rope)
        kv, batch = device_kv(pool.kv), pool.active
        step = self._step(kv, batch)
        try:
            return step.run(kv, embeds, rope)
        except Exception:
            if step.runs or not self._graphs:
                raise
        # The step's first run captures its graph. What can't be captured is launched kernel by kernel.
        self._graphs = False
        self._decoder = self._open_decoder()
        return self._step(kv, batch).run(kv, embeds, rope)

    def _step(self, kv: DeviceKv, batch: int) -> DeviceDecodeStep:
        step = kv.steps.get(batch)
        if step is None or step.session is not self._decoder:
            options = self._plain
            if self._graphs and self._captured < MOST_GRAPHS:
                self._captured += 1
                options = self._run_options(gpu_graph_id=str(self._captured))
            step = DeviceDecodeStep(self._memory, self._decoder, kv, batch, self._manifest, options)
            kv.steps[batch] = step
        return step


def _recycle(engine: "weakref.ref[OrtDeviceEngine]", kv: DeviceKv) -> None:
    """Keep the memory of a pool that is gone, if its engine is not."""
    if owner := engine():
        owner.keep_spare(kv)
