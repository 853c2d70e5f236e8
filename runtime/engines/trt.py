# SPDX-License-Identifier: Apache-2.0
"""The TensorRT engine: three plans on one stream of a GPU.

All contexts share one block of memory for activations, since one runs at a time. Embeddings and lengths go to
the card and, of a decode step, one token per sequence comes back.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError
from starkv.host import usable_processors
from starkv.kernels.c_abi import KernelAbi, KernelError
from starkv.kernels.library_paths import KERNELS
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method, kv_bytes_per_row
from starkv.runtime.engines.cuda import Cuda
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.cuda_python import CudaPython
from starkv.runtime.engines.device_kv import DeviceArena, DeviceKv, device_arena, device_kv
from starkv.runtime.engines.device_tensor import numpy_dtype, on_device
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.engines.stepping import SteppingEngine, store_norms
from starkv.runtime.engines.trt_compress import ALIASES, TrtCompressor
from starkv.runtime.engines.trt_decode import DecodeParts, TrtDecodeStep, bind_cache, cache_aliases
from starkv.runtime.engines.trt_memory import check_memory, largest_scratch
from starkv.runtime.engines.trt_opening import COMPRESS, DECODER, VISION, find_machine, open_plans
from starkv.runtime.generation import Sampler
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.vision_plan import plan_vision
from starkv.trt_compat.inspecting import watched_values
from starkv.trt_compat.running import Execution, Plan

PREFILL, DECODE = 0, 1
"""The decoder's profiles."""
POOL_STEP = 512
"""Capacities of pools are multiples of this, so that their memory, and CUDA graphs on it, are used again."""
SPARE_POOLS = 2
"""Pools whose memory is kept for the next of the same size."""


class TrtEngine(SteppingEngine):
    """Runs an engine directory that ``starkv build --backend trt`` made."""

    def __init__(
        self,
        directory: Path,
        verify: bool = True,
        threads: int | None = None,
        cuda: Cuda | None = None,
        kernels: KernelAbi | None = None,
        weight_budget: int | None = None,
    ) -> None:
        """Open an engine directory.

        Args:
            directory: the engine.
            verify: compare every file with its recorded hash first.
            threads: of what runs on the processor.
            cuda: the card; through cuda-python if None.
            kernels: the library that picks tokens; the one beside the engine if None.
            weight_budget: bytes of weights on the card, of an engine that streams them.

        Raises:
            EngineError: the directory is damaged or built for something else, there is no GPU or no TensorRT,
                or the card has no room.
        """
        super().__init__(directory, "trt", verify)
        self._threads = threads or usable_processors()
        machine = find_machine(directory, self._manifest)
        self._gpu, self._build = machine.gpu, machine.build
        self._cuda: Cuda = cuda or CudaPython()
        check_memory(self._manifest, self._build, self._cuda, weight_budget)
        self._plans = open_plans(directory, machine, weight_budget)
        self._memory = CudaMemory(self._cuda, self._cuda.new_stream())
        self._dtype = numpy_dtype(self._manifest.compute_dtype)
        size = largest_scratch(self._plans)
        self._scratch = self._memory.block(size)
        aliases = cache_aliases(self._manifest.text.layers)
        self._vision = self._execution(VISION, 0, {})
        self._prefill_run = self._execution(DECODER, PREFILL, aliases)
        decode = self._execution(DECODER, DECODE, aliases)
        self._kernels = kernels or _kernels_beside(directory)
        self._decode_parts = DecodeParts(decode, self._memory, self._kernels, self._manifest)
        self._trt_compressor = TrtCompressor(
            self._manifest, self._open_host_graph, self._memory, self._execution(COMPRESS, 0, ALIASES)
        )
        # A plan whose weights come from the host does so at every run, which no graph can hold.
        self._graphs = not self._build.weight_streaming
        self._bound: TrtDecodeStep | None = None
        self._spare: list[DeviceKv] = []

    def _execution(self, name: str, profile: int, aliases: dict[str, str]) -> Execution:
        scratch = self._scratch
        return Execution(
            self._plans[name], profile, scratch.address, scratch.size, self._memory.stream, aliases
        )

    @property
    def info(self) -> EngineInfo:
        dtype = self._manifest.compute_dtype
        return EngineInfo(
            backend="trt",
            device=self._gpu.name,
            compute_dtype=dtype,
            kv_dtype=dtype,
            kv_bytes_per_row=kv_bytes_per_row(self._manifest),
            kv_methods=ENGINE_METHODS if find_spec("onnxruntime") else (FULL, STAR_KV),
            threads=self._threads,
            loaded_form="portable",
        )

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        return self._graphs

    @property
    def picks_on_device(self) -> bool:
        """Whether tokens are picked on the card."""
        return self._kernels is not None

    @property
    def _chunk(self) -> int:
        return self._build.prefill_rows

    @property
    def _compressor(self) -> OrtCompressor:
        return self._trt_compressor

    def _open_host_graph(self, graph: str) -> Any:
        """A session of ONNX Runtime for a method that runs on the processor.

        Raises:
            EngineError: it is not installed.
        """
        try:
            import onnxruntime
        except ImportError:
            raise EngineError(
                "this KV method runs on the processor and needs ONNX Runtime; pip install 'starkv[cpu]', or "
                "use star_kv"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        return onnxruntime.InferenceSession(
            self._directory / f"{graph}.onnx", options, providers=["CPUExecutionProvider"]
        )

    def encode_image(self, image: ImageInputs) -> Floats:
        plan = plan_vision(image.grid_h, image.grid_w, self._manifest.vision)
        feeds = {"pixel_values": image.pixel_values, **plan.inputs()}
        tensors = {name: on_device(self._memory, array) for name, array in feeds.items()}
        tokens = image.merged_grid[0] * image.merged_grid[1]
        embeds = self._memory.empty((tokens, self._manifest.text.hidden), np.float32)
        for name, tensor in tensors.items():
            self._vision.bind(name, tensor.address, tensor.shape)
        self._vision.bind("image_embeds", embeds.address)
        self._vision.enqueue()
        result: Floats = embeds.read()
        return result

    def new_arena(self, rows: int) -> Arena:
        self._check_rows(rows)
        kv = self._allocate(1, rows)
        return DeviceArena.around(kv, self._manifest.text)

    def _allocate(self, slots: int, rows: int) -> DeviceKv:
        """A cache; memory that is kept for later makes room for it if need be."""
        text = self._manifest.text
        try:
            return DeviceKv.allocate(self._memory, text, slots, rows, self._dtype)
        except EngineError:
            if not self._spare:
                raise
        self._drop(self._spare)
        self._spare = []
        return DeviceKv.allocate(self._memory, text, slots, rows, self._dtype)

    def new_pool(self, slots: int, rows: int, method: str = FULL) -> Pool:
        check_kv_method(self.info, method)
        self._check_rows(rows)
        if slots > self._build.sessions:
            raise EngineError(
                f"{slots} slots are asked for, but {self._directory} was built for {self._build.sessions} "
                "sessions; build it with more --sessions"
            )
        rows = min(-(-rows // POOL_STEP) * POOL_STEP, self._build.cache_rows)
        fitting = [kv for kv in self._spare if (kv.slots, kv.capacity) == (slots, rows)]
        if fitting:
            kv = fitting[0]
            self._spare = [other for other in self._spare if other is not kv]
        else:
            kv = self._allocate(slots, rows)
        pool = Pool(kv)
        # A pool that nobody uses any more leaves its memory, and the graphs on it, to the next.
        weakref.finalize(pool, _recycle, weakref.ref(self), kv)
        return pool

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The opened plans by name, to be looked at."""
        return self._plans

    def executions(self) -> dict[str, Execution]:
        """What runs, by the names that a manifest gives scratch memory by."""
        return {
            "vision": self._vision,
            "decoder.prefill": self._prefill_run,
            "decoder.decode": self._decode_parts.execution,
        }

    @contextmanager
    def watched_layers(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Collect values inside of the plans while images are encoded and prompts prefilled in the block.

        Empty unless the engine was built with ``--debug-layers``.
        """

        def fetch(address: int, array: NDArray[Any], stream: int) -> None:
            self._cuda.download(array, address, stream)
            self._cuda.synchronize(stream)

        values: dict[str, NDArray[Any]] = {}
        with watched_values(self._vision, fetch) as seen, watched_values(self._prefill_run, fetch) as others:
            yield values
        values |= seen | others

    def keep_spare(self, kv: DeviceKv) -> None:
        """Keep memory for the next pool of its size; the oldest of too many is given up."""
        kv.forget()
        spare = [*self._spare, kv]
        self._drop(spare[:-SPARE_POOLS])
        self._spare = spare[-SPARE_POOLS:]

    def _drop(self, caches: Sequence[DeviceKv]) -> None:
        """Give up caches and the graphs on them."""
        for kv in caches:
            for step in kv.steps.values():
                step.release()
                if self._bound is step:
                    self._bound = None
            kv.steps.clear()

    def _prefill_chunk(self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, last: bool) -> None:
        own, text = device_arena(arena), self._manifest.text
        lengths, rows = arena.kv.lengths, embeds.shape[1]
        inputs = {
            "inputs_embeds": np.ascontiguousarray(embeds, np.float32),
            "rope_cos": np.ascontiguousarray(rope.cos, np.float32),
            "rope_sin": np.ascontiguousarray(rope.sin, np.float32),
            "kv_len": lengths,
            "last_index": np.full(1, rows - 1, np.int32),
        }
        tensors = {name: on_device(self._memory, array) for name, array in inputs.items()}
        for name, tensor in tensors.items():
            self._prefill_run.bind(name, tensor.address, tensor.shape)
        bind_cache(self._prefill_run, own.device_kv.keys, own.device_kv.values, 1)
        window = min(rows, self._manifest.observation_window)
        own.queries = self._memory.empty((text.layers, 1, text.heads, window, text.head_dim), self._dtype)
        norms = self._memory.empty((text.layers, 1, rows), np.float32)
        result = self._memory.empty(logits.shape, np.float32)
        for name, tensor in (("q_window", own.queries), ("hidden_norm", norms), ("logits", result)):
            self._prefill_run.bind(name, tensor.address)
        self._prefill_run.enqueue()
        logits[:] = result.read()
        store_norms(arena, norms.read(), rows)
        lengths += rows

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        self._check_decode(pool, embeds)
        kv, step = device_kv(pool.kv), self._step(pool)
        lengths = kv.lengths[:, : pool.active]
        logits = step.logits(lengths, embeds, rope)
        lengths += 1
        return logits

    def decode_tokens(self, pool: Pool, embeds: Floats, rope: Rope, samplers: Sequence[Sampler]) -> list[int]:
        if self._kernels is None:
            return super().decode_tokens(pool, embeds, rope, samplers)
        self._check_decode(pool, embeds)
        kv, step = device_kv(pool.kv), self._step(pool)
        lengths = kv.lengths[:, : pool.active]
        tokens = step.tokens(lengths, embeds, rope, [sampler.draw() for sampler in samplers])
        lengths += 1
        return tokens

    def _step(self, pool: Pool) -> TrtDecodeStep:
        """The step of a pool's cache and batch, ready to run."""
        kv, batch = device_kv(pool.kv), pool.active
        step: TrtDecodeStep | None = kv.steps.get(batch)
        if step is None:
            step = kv.steps[batch] = TrtDecodeStep(self._decode_parts, kv, batch)
        if step.captured:
            return step
        if self._bound is not step:
            step.bind()
            self._bound = step
        if self._graphs and step.runs:
            try:
                step.capture()
            except EngineError:
                # What can't be recorded is launched kernel by kernel.
                self._graphs = False
        return step


def _kernels_beside(directory: Path) -> KernelAbi | None:
    """The kernels' library of an engine; None where it has none, or one that doesn't fit."""
    path = directory / KERNELS["cuda"]
    try:
        return KernelAbi(path) if path.is_file() else None
    except KernelError:
        return None


def _recycle(engine: "weakref.ref[TrtEngine]", kv: DeviceKv) -> None:
    """Keep the memory of a pool that is gone, if its engine is not."""
    if owner := engine():
        owner.keep_spare(kv)
