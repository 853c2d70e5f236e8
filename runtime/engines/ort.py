# SPDX-License-Identifier: Apache-2.0
"""The ONNX Runtime engine on the CPU.

Keys and values are numpy buffers bound by address as past *and* present: the attention operator writes new
rows in place and nothing of the cache is ever copied between steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError, UsageError
from starkv.host import cpu_model, usable_processors
from starkv.manifest import Manifest, read_manifest, verify_files
from starkv.methods.names import ENGINE_METHODS, FULL
from starkv.methods.rows import PromptRows
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method
from starkv.runtime.engines.embedding import EmbeddingTable
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.engines.ort_decode import DecodeStep, bind_array, bind_cache
from starkv.runtime.kv.buffers import Arena, KvBuffers, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.vision_plan import plan_vision

PREFILL_CHUNK = 512
"""Rows per prefill call: bounds the activations' memory; larger chunks are no faster on the CPU."""


def chunk_lengths(total: int, chunk: int, window: int) -> list[int]:
    """Split a prefill so that the last chunk holds the whole observation window, if the prefill does.

    No chunk is longer than ``chunk``, or than ``window`` where that is more.
    """
    chunk = max(chunk, window)
    whole, rest = divmod(total, chunk)
    lengths = [chunk] * whole + ([rest] if rest else [])
    if len(lengths) > 1 and lengths[-1] < window:
        lengths[-2:] = [chunk + rest - window, window]
    return lengths


class OrtEngine:
    """Runs an engine directory that ``starkv build`` made for ONNX Runtime."""

    def __init__(self, directory: Path, verify: bool = True, threads: int | None = None) -> None:
        """Open an engine directory.

        Args:
            directory: the engine.
            verify: compare every file with its recorded hash first.
            threads: intra-op threads; the processors this process may use by default.

        Raises:
            EngineError: the directory is damaged, built for another backend, or onnxruntime is missing.
        """
        self._manifest = read_manifest(directory)
        if self._manifest.backend != "ort":
            raise EngineError(f"{directory} was built for {self._manifest.backend}, not for ONNX Runtime")
        if verify:
            verify_files(directory, self._manifest)
        try:
            import onnxruntime
        except ImportError:
            raise EngineError("ONNX Runtime is not installed; `pip install starkv[cpu]`") from None
        self._ort = onnxruntime
        self._threads = threads or usable_processors()
        self._prepacked = self._prepacked_fits()
        self._embedding = EmbeddingTable(directory / "embedding.safetensors")
        self._vision = self._open(directory, "vision")
        self._decoder = self._open(directory, "decoder")
        if "last_rows" not in {entry.name for entry in self._decoder.get_inputs()}:
            raise EngineError(f"{directory} was built by an older starkv; build it again")
        self._decode_step: DecodeStep | None = None
        # A large prefill's activations would stay reserved as long as the engine lives.
        self._give_memory_back = onnxruntime.RunOptions()
        self._give_memory_back.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._compressor = OrtCompressor(
            self._manifest.text,
            self._manifest.observation_window,
            lambda graph: self._load(directory / f"{graph}.onnx", optimized=False),
        )

    def _prepacked_fits(self) -> bool:
        versions = self._manifest.tool_versions
        here = (self._ort.__version__, cpu_model())
        return (versions.get("prepacked_onnxruntime"), versions.get("prepacked_cpu")) == here

    def _open(self, directory: Path, graph: str) -> Any:
        if self._prepacked:
            return self._load(directory / f"{graph}.prepacked.onnx", optimized=True)
        return self._load(directory / f"{graph}.onnx", optimized=False)

    def _load(self, path: Path, optimized: bool) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Half the load time with two threads; versions before 1.32 ignore it.
        options.add_session_config_entry("session.prepack.enable_parallel", "1")
        if optimized:
            # Doing so again would cost the load time that it saves.
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self._ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the binding raises many classes, all of its own
            reason = str(error).splitlines()[0]
            raise EngineError(f"ONNX Runtime {self._ort.__version__} can't load {path}: {reason}") from None

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def info(self) -> EngineInfo:
        text = self._manifest.text
        return EngineInfo(
            backend="ort-cpu",
            device=cpu_model(),
            compute_dtype="float32",
            kv_dtype="float32",
            kv_bytes_per_row=2 * text.layers * text.kv_heads * text.head_dim * 4,
            kv_methods=ENGINE_METHODS,
            threads=self._threads,
            loaded_form="prepacked" if self._prepacked else "portable",
        )

    def embed(self, token_ids: Sequence[int]) -> Floats:
        return self._embedding(token_ids)

    def encode_image(self, image: ImageInputs) -> Floats:
        plan = plan_vision(image.grid_h, image.grid_w, self._manifest.vision)
        feeds = {"pixel_values": image.pixel_values, **plan.inputs()}
        embeds: Floats = self._vision.run(["image_embeds"], feeds, self._give_memory_back)[0]
        return embeds

    def new_arena(self, rows: int) -> Arena:
        self._check_rows(rows)
        return Arena.allocate(self._manifest.text, rows)

    def new_pool(self, slots: int, rows: int, method: str = FULL) -> Pool:
        check_kv_method(self.info, method)
        self._check_rows(rows)
        return Pool(KvBuffers.allocate(self._manifest.text, slots, rows))

    def most_kept_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        check_kv_method(self.info, policy.method)
        return self._compressor.most_rows(prompt_rows, policy)

    def _check_rows(self, rows: int) -> None:
        limit = self._manifest.max_context
        if rows > limit:
            raise UsageError(
                f"{rows} KV rows are needed, but {self._manifest.name} was built for {limit} at most"
            )

    def prefill(self, arena: Arena, embeds: Floats, rope: Rope) -> Floats:
        start, total = int(arena.kv.lengths.max()), len(embeds)
        if not total:
            raise UsageError("a prefill needs at least one row")
        if start + total > arena.kv.capacity:
            raise UsageError(
                f"prefill of {total} rows behind {start} exceeds the arena of {arena.kv.capacity} rows"
            )
        logits = np.empty((1, self._manifest.text.vocab), np.float32)
        done = 0
        for length in chunk_lengths(total, PREFILL_CHUNK, self._manifest.observation_window):
            part = slice(done, done + length)
            done += length
            options = self._give_memory_back if done == total else None
            tables = Rope(rope.cos[:, part], rope.sin[:, part])
            self._prefill_chunk(arena, embeds[None, part], tables, logits, options)
        row: Floats = logits[0]
        return row

    def _prefill_chunk(
        self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, options: Any | None
    ) -> None:
        lengths, rows = arena.kv.lengths, embeds.shape[1]
        last_rows = lengths + np.int32(rows - 1)
        binding = self._decoder.io_binding()
        bind_cache(binding, arena.host_kv, batch=1)
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
        self._decoder.run_with_iobinding(binding, options)
        q_window, hidden_norm = binding.get_outputs()[-2:]
        arena.q_window = q_window.numpy()
        norms = hidden_norm.numpy()
        for layer, start in enumerate(lengths[:, 0]):
            arena.hidden_norm[layer, :, start : start + rows] = norms[layer]
        lengths += rows

    def compress(
        self,
        arena: Arena,
        pool: Pool,
        handle: int,
        prompt: PromptRows,
        policy: KvPolicy,
        memory: StarKVMemory | None = None,
    ) -> Compressed:
        check_kv_method(self.info, policy.method)
        return self._compressor.compress(arena, pool, pool.slot_of(handle), prompt, policy, memory)

    def decode(self, pool: Pool, embeds: Floats, rope: Rope) -> Floats:
        expected = (pool.active, self._manifest.text.hidden)
        if not pool.active or embeds.shape != expected:
            raise ValueError(f"decode got embeddings {embeds.shape} for {pool.active} sequences in use")
        longest = int(pool.kv.lengths[:, : pool.active].max())
        if longest >= pool.kv.capacity:
            raise UsageError(f"a sequence has filled its slot of {pool.kv.capacity} rows")
        step = self._decode_step
        if step is None or not step.fits(pool):
            step = self._decode_step = DecodeStep(self._decoder, pool, self._manifest)
        return step.run(pool, embeds, rope)
