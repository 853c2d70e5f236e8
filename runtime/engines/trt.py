# SPDX-License-Identifier: Apache-2.0
"""The TensorRT engine: three plans on one stream of a GPU.

All contexts share one block of memory for activations, since one runs at a time. Embeddings and lengths go to
the card and, of a decode step, one token per sequence comes back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import UsageError
from starkv.host import usable_processors
from starkv.kernels.c_abi import KernelAbi
from starkv.methods.names import ENGINE_METHODS, FULL, STAR_KV
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method, kv_bytes_per_row
from starkv.runtime.engines.cuda import Cuda
from starkv.runtime.engines.cuda_memory import CudaMemory
from starkv.runtime.engines.cuda_python import CudaPython
from starkv.runtime.engines.device_codes import DeviceCodes
from starkv.runtime.engines.device_kv import device_arena, device_kv
from starkv.runtime.engines.device_tensor import DeviceTensor, numpy_dtype, on_device
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.engines.stepping import SteppingEngine, store_norms
from starkv.runtime.engines.trt_caches import DecoderCaches
from starkv.runtime.engines.trt_compress import TrtCompressor
from starkv.runtime.engines.trt_decode import DecodeParts, TrtDecodeStep
from starkv.runtime.engines.trt_kv import POOL_STEP, TrtKv
from starkv.runtime.engines.trt_looking import layer_times, layer_values
from starkv.runtime.engines.trt_memory import (
    budget_of_environment,
    check_memory,
    largest_scratch,
    room_for,
)
from starkv.runtime.engines.trt_opening import (
    find_machine,
    kernels_beside,
    open_host_graph,
    open_packing,
    open_plans,
)
from starkv.runtime.engines.trt_pools import DecodeSteps, SparePools
from starkv.runtime.engines.trt_tensors import COMPRESS, COMPRESS_ALIASES, DECODER, VISION, cache_aliases
from starkv.runtime.generation import Sampler
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.codecs import packing_info
from starkv.runtime.kv.packed import NO_POSITIONS
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.vision_plan import plan_vision
from starkv.trt_compat.execution import Execution
from starkv.trt_compat.running import Plan

PREFILL, DECODE = 0, 1
"""The decoder's profiles."""


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
            weight_budget: bytes of weights on the card, of an engine that streams them; what
                ``STARKV_WEIGHTS_MIB`` says if None, else as many as fit.

        Raises:
            EngineError: the directory is damaged or built for something else, there is no GPU or no TensorRT,
                or the card has no room.
        """
        super().__init__(directory, "trt", verify)
        self._threads = threads or usable_processors()
        machine = find_machine(directory, self._manifest)
        self._gpu, self._build = machine.gpu, machine.build
        self._cuda: Cuda = cuda or CudaPython()
        budget = budget_of_environment() if weight_budget is None else weight_budget
        room = check_memory(self._manifest, self._build, self._cuda, budget)
        self._plans = open_plans(directory, self._manifest, machine, room)
        spare = SparePools()
        self._memory = CudaMemory(self._cuda, self._cuda.new_stream(), spare.way_to_give_up())
        self._dtype = numpy_dtype(self._manifest.compute_dtype)
        size = largest_scratch(self._plans)
        with room_for("activations", size, "build the engine with smaller --max-pixels or --prefill-rows"):
            self._scratch = self._memory.block(size)
        stream, scratch = self._memory.stream, (self._scratch.address, self._scratch.size)

        def execution(name: str, profile: int, aliases: Mapping[str, str]) -> Execution:
            return Execution(plans[name], profile, *scratch, stream, aliases)

        plans, caches = self._plans, cache_aliases(self._manifest)
        self._vision = execution(VISION, 0, {})
        self._prefill_run = execution(DECODER, PREFILL, caches)
        self._compress_run = execution(COMPRESS, 0, COMPRESS_ALIASES)
        kernels = kernels or kernels_beside(directory)
        self._packing = open_packing(directory, self._manifest, self._memory, kernels)
        self._kv = TrtKv(self._manifest, self._memory, spare, self._packing)
        self._caches = DecoderCaches(self._manifest, self._memory)
        self._decode_parts = DecodeParts(
            new_execution=partial(execution, DECODER, DECODE, caches),
            plain=execution(DECODER, DECODE, caches),
            memory=self._memory,
            kernels=kernels,
            manifest=self._manifest,
            caches=self._caches,
            graphs=not (self._build.weight_streaming and plans[DECODER].streams),
        )
        self._steps = DecodeSteps(self._decode_parts)
        self._trt_compressor = TrtCompressor(
            self._manifest,
            partial(open_host_graph, directory, self._threads),
            self._memory,
            self._compress_run,
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
            kv_packing=packing_info(self._packing.codec if self._packing else None),
        )

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are CUDA graphs."""
        return self._decode_parts.graphs

    @property
    def picks_on_device(self) -> bool:
        """Whether tokens are picked on the card."""
        return self._decode_parts.kernels is not None

    @property
    def plans(self) -> Mapping[str, Plan]:
        """The opened plans by name, to be looked at."""
        return self._plans

    @property
    def _chunk(self) -> int:
        return self._build.prefill_rows

    @property
    def _compressor(self) -> OrtCompressor:
        return self._trt_compressor

    def executions(self) -> dict[str, Execution]:
        """What runs, by the names that a manifest gives scratch memory by; decoding is without graphs."""
        return {
            "vision": self._vision,
            "decoder.prefill": self._prefill_run,
            "decoder.decode": self._decode_parts.plain,
            "compress": self._compress_run,
        }

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Decode kernel by kernel in the block, to look at or to compare."""
        parts = self._decode_parts
        graphs, parts.graphs = parts.graphs, False
        try:
            yield
        finally:
            parts.graphs = graphs

    @contextmanager
    def timed_layers(self) -> Iterator[dict[str, dict[str, float]]]:
        """Milliseconds of each layer over all that runs in the block, by :meth:`executions`' names.

        Everything waits for the card meanwhile, and nothing is a CUDA graph.
        """
        with self.without_graphs(), layer_times(self.executions(), self._memory) as times:
            yield times

    @contextmanager
    def watched_layers(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Values inside of the plans while images are encoded and prompts prefilled in the block.

        Empty unless the engine was built with ``--debug-layers``.
        """
        with layer_values((self._vision, self._prefill_run), self._memory) as values:
            yield values

    def encode_image(self, image: ImageInputs) -> Floats:
        plan = plan_vision(image.grid_h, image.grid_w, self._manifest.vision)
        feeds = {"pixel_values": image.pixel_values, **plan.inputs()}
        tokens = image.merged_grid[0] * image.merged_grid[1]
        shape = tokens, self._manifest.text.hidden
        size = sum(array.nbytes for array in feeds.values()) + 4 * prod(shape)
        with room_for("an image", size, "use a smaller one, fewer --sessions, or a smaller --kv-budget"):
            tensors = {name: on_device(self._memory, array) for name, array in feeds.items()}
            embeds = self._memory.empty(shape, np.float32)
        for name, tensor in tensors.items():
            self._vision.bind(name, tensor.address, tensor.shape)
        self._vision.bind("image_embeds", embeds.address, shape)
        self._vision.enqueue()
        result: Floats = embeds.read()
        return result

    def new_arena(self, rows: int) -> Arena:
        self._check_rows(rows)
        return self._kv.new_arena(rows)

    def new_pool(self, slots: int, rows: int, method: str = FULL, packed: bool = False) -> Pool:
        check_kv_method(self.info, method, packed)
        self._check_rows(rows)
        if slots > self._build.sessions:
            raise UsageError(
                f"{slots} slots are asked for, but {self._directory} was built for {self._build.sessions} "
                "sessions; build it with more --sessions"
            )
        rows = min(-(-rows // POOL_STEP) * POOL_STEP, self._build.cache_rows)
        return self._kv.new_pool(slots, rows, packed)

    def _prefill_chunk(self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, last: bool) -> None:
        own, text, run = device_arena(arena), self._manifest.text, self._prefill_run
        lengths, rows = arena.kv.lengths, embeds.shape[1]
        inputs = {
            "inputs_embeds": np.ascontiguousarray(embeds, np.float32),
            "rope_cos": np.ascontiguousarray(rope.cos, np.float32),
            "rope_sin": np.ascontiguousarray(rope.sin, np.float32),
            "kv_len": lengths,
            "last_index": np.full(1, rows - 1, np.int32),
        }
        window = min(rows, self._manifest.observation_window)
        tensors = {name: on_device(self._memory, array) for name, array in inputs.items()}
        own.queries = self._memory.empty((text.layers, 1, text.heads, window, text.head_dim), self._dtype)
        outputs: dict[str, DeviceTensor] = {
            "q_window": own.queries,
            "hidden_norm": self._memory.empty((text.layers, 1, rows), np.float32),
            "logits": self._memory.empty(logits.shape, np.float32),
        }
        for name, tensor in (tensors | outputs).items():
            run.bind(name, tensor.address, tensor.shape)
        self._caches.bind(run, own.device_kv, 1)
        run.enqueue()
        logits[:] = outputs["logits"].read()
        store_norms(arena, outputs["hidden_norm"].read(), rows)
        lengths += rows

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        step, lengths = self._step(pool, embeds, rope)
        logits = step.logits(lengths, embeds, rope)
        lengths += 1
        return logits

    def decode_tokens(self, pool: Pool, embeds: Floats, rope: Rope, samplers: Sequence[Sampler]) -> list[int]:
        if not self.picks_on_device:
            return super().decode_tokens(pool, embeds, rope, samplers)
        step, lengths = self._step(pool, embeds, rope)
        draws = [sampler.draw() for _, sampler in zip(pool.handles, samplers, strict=True)]
        tokens = step.tokens(lengths, embeds, rope, draws)
        lengths += 1
        return tokens

    def _step(self, pool: Pool, embeds: Floats, rope: Rope) -> tuple[TrtDecodeStep, NDArray[np.int32]]:
        """The step of a pool's sequences, and their lengths ``[L, B]``, which are written to."""
        kv = device_kv(pool.kv)
        if isinstance(kv, DeviceCodes):
            if rope.positions is None:
                raise UsageError(NO_POSITIONS)
            kv.packing.check_positions(rope.positions)
        self._start_decode(pool, embeds, rope)
        if isinstance(kv, DeviceCodes):
            kv.row_positions.follow(kv, pool.active)
        return self._steps.get(kv, pool.active), kv.lengths[:, : pool.active]
