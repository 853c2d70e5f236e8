# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime engine on the CPU.

Keys and values are numpy buffers bound by address as past *and* present: the attention operator writes new
rows in place and nothing of the cache is ever copied between steps.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError, UsageError
from starkv.host import cpu_model
from starkv.methods.names import ENGINE_METHODS, FULL
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method, kv_bytes_per_row
from starkv.runtime.engines.ort_base import CPU_PROVIDER, OrtBase
from starkv.runtime.engines.ort_binding import CacheBinding, FloatCache, bind_array
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.engines.ort_decode import DecodeStep
from starkv.runtime.engines.ort_packed import FloatBesidePacked, packed_cache
from starkv.runtime.engines.stepping import store_norms
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.codecs import open_codec, packing_info, require_codec
from starkv.runtime.kv.packed import NO_POSITIONS, PackedKv

PREFILL_CHUNK = 512
"""Rows per prefill call: bounds the activations' memory; larger chunks are no faster on the CPU."""
_OLD_RUNTIME = (
    "attention to its {packing} cache is an operator that older versions don't have: `pip install --upgrade "
    "onnxruntime`, or pack the plain engine with --kv-rank 1 --kv-quant int8, which needs no such operator"
)


class OrtEngine(OrtBase):
    """Runs an engine directory that ``starkv build`` made for ONNX Runtime on processors."""

    def __init__(self, directory: Path, verify: bool = True, threads: int | None = None) -> None:
        """Open an engine directory.

        Args:
            directory: the engine.
            verify: compare every file with its recorded hash first.
            threads: intra-op threads; the processors this process may use by default.

        Raises:
            EngineError: the directory is damaged, built for another backend or for a GPU, or onnxruntime is
                missing.
        """
        super().__init__(directory, verify, threads)
        if self._manifest.compute_dtype != "float32":
            raise EngineError(
                f"{directory} computes in {self._manifest.compute_dtype}, for a GPU; build one for "
                "processors with `starkv build`"
            )
        versions = self._manifest.tool_versions
        here = (self._ort.__version__, cpu_model())
        self._prepacked = (versions.get("prepacked_onnxruntime"), versions.get("prepacked_cpu")) == here
        self._vision_session = self._open("vision")
        self._decoder = self._check_decoder(self._open_decoder())
        self._decode_step: DecodeStep | None = None
        self._codec = open_codec(directory, self._manifest)
        self._packed_cache = None if self._codec is None else packed_cache(self._codec)
        self._float_cache: CacheBinding = (
            FloatBesidePacked(self._packed_cache) if self._packed_cache else FloatCache()
        )
        self._give_memory_back = self._run_options(memory__enable_memory_arena_shrinkage="cpu:0")
        self._host_compressor = OrtCompressor(
            self._manifest.text, self._manifest.observation_window, self._open_host_graph
        )

    def _open(self, graph: str) -> Any:
        # Half the load time with two threads; versions before 1.32 ignore it.
        entries = {"session.prepack.enable_parallel": "1"}
        if self._prepacked:
            return self._load(f"{graph}.prepacked.onnx", (CPU_PROVIDER,), entries, optimized=True)
        return self._load(f"{graph}.onnx", (CPU_PROVIDER,), entries)

    def _open_decoder(self) -> Any:
        try:
            return self._open("decoder")
        except EngineError as error:
            packing = self._manifest.kv_packing
            if packing is None or packing.rank is not None:
                raise
            raise EngineError(f"{error}; {_OLD_RUNTIME.format(packing=packing.describe())}") from None

    @property
    def sessions(self) -> tuple[Any, Any]:
        """ONNX Runtime's sessions of vision tower and decoder, to be looked at."""
        return self._vision_session, self._decoder

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            backend="ort-cpu",
            device=cpu_model(),
            compute_dtype="float32",
            kv_dtype="float32",
            kv_bytes_per_row=kv_bytes_per_row(self._manifest),
            kv_methods=ENGINE_METHODS,
            threads=self._threads,
            loaded_form="prepacked" if self._prepacked else "portable",
            kv_packing=packing_info(self._codec),
        )

    @property
    def _vision(self) -> Any:
        return self._vision_session

    @property
    def _vision_run(self) -> Any:
        return self._give_memory_back

    @property
    def _chunk(self) -> int:
        return PREFILL_CHUNK

    @property
    def _compressor(self) -> OrtCompressor:
        return self._host_compressor

    def new_arena(self, rows: int) -> Arena:
        self._check_rows(rows)
        arena = Arena.allocate(self._manifest.text, rows)
        arena.host_kv.unpack = None if self._codec is None else self._codec.unpack
        return arena

    def new_pool(self, slots: int, rows: int, method: str = FULL, packed: bool = False) -> Pool:
        check_kv_method(self.info, method)
        self._check_rows(rows)
        if packed:
            return Pool(require_codec(self._codec).new_store(slots, rows))
        return Pool(KvBuffers.allocate(self._manifest.text, slots, rows))

    def _prefill_chunk(self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, last: bool) -> None:
        lengths, rows = arena.kv.lengths, embeds.shape[1]
        last_rows = lengths + np.int32(rows - 1)
        binding = self._decoder.io_binding()
        self._float_cache.bind(binding, arena.kv, 1)
        inputs: dict[str, NDArray[Any]] = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "rope_cos": np.ascontiguousarray(rope.cos),
            "rope_sin": np.ascontiguousarray(rope.sin),
            "last_rows": last_rows.reshape(-1),
            "longest": np.array([last_rows.max() + 1], np.int32),
            "last_index": np.full(1, rows - 1, np.int32),
        }
        for name, array in inputs.items():
            bind_array(binding.bind_input, name, array)
        bind_array(binding.bind_output, "logits", logits)
        binding.bind_output("q_window", "cpu")
        binding.bind_output("hidden_norm", "cpu")
        # A large prompt's activations would stay reserved as long as the engine lives.
        self._decoder.run_with_iobinding(binding, self._give_memory_back if last else None)
        q_window, hidden_norm = binding.get_outputs()[-2:]
        arena.q_window = q_window.numpy()
        store_norms(arena, hidden_norm.numpy(), rows)
        lengths += rows

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        if isinstance(pool.kv, PackedKv) and rope.positions is None:
            raise UsageError(NO_POSITIONS)
        self._start_decode(pool, embeds, rope)
        step = self._decode_step
        if step is None or not step.fits(pool):
            packed = self._packed_cache if isinstance(pool.kv, PackedKv) else None
            cache = packed or self._float_cache
            step = self._decode_step = DecodeStep(self._decoder, pool, self._manifest, cache)
        return step.run(pool, embeds, rope)
