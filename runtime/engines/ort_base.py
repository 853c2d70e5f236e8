# SPDX-License-Identifier: Apache-2.0
"""What the ONNX Runtime engines share, wherever they compute: files, embedding, vision, prefill in chunks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from starkv.errors import EngineError, UsageError
from starkv.host import usable_processors
from starkv.manifest import Manifest, read_manifest, verify_files
from starkv.methods.rows import PromptRows
from starkv.runtime.engines.base import EngineInfo, Floats, Rope, check_kv_method
from starkv.runtime.engines.embedding import EmbeddingTable
from starkv.runtime.engines.ort_compress import OrtCompressor
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory
from starkv.runtime.preprocess.image import ImageInputs
from starkv.runtime.preprocess.vision_plan import plan_vision

CPU_PROVIDER = "CPUExecutionProvider"
Providers = Sequence[str | tuple[str, dict[str, str]]]


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


class OrtBase(ABC):
    """Opens an engine directory; the engines say where keys and values lie and how a graph is run on them."""

    def __init__(self, directory: Path, verify: bool, threads: int | None) -> None:
        """Read the manifest, check the files and find ONNX Runtime.

        Args:
            directory: the engine.
            verify: compare every file with its recorded hash first.
            threads: intra-op threads; the processors this process may use by default.

        Raises:
            EngineError: the directory is damaged, built for another backend, or onnxruntime is missing.
        """
        self._directory = directory
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
        self._embedding = EmbeddingTable(directory / "embedding.safetensors")

    def _open_host_graph(self, graph: str) -> Any:
        """The session of a graph that works on host memory."""
        return self._load(f"{graph}.onnx", (CPU_PROVIDER,))

    def _load(
        self,
        name: str,
        providers: Providers,
        entries: Mapping[str, str] | None = None,
        optimized: bool = False,
    ) -> Any:
        """Open the session of a graph.

        Args:
            name: file in the engine's directory.
            providers: as ONNX Runtime takes them.
            entries: of the session's configuration.
            optimized: the graph is so already; doing it again would cost load time.

        Raises:
            EngineError: ONNX Runtime can't.
        """
        path = self._directory / name
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        if optimized:
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self._ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # the binding raises many classes, all of its own
            reason = str(error).splitlines()[0]
            raise EngineError(f"ONNX Runtime {self._ort.__version__} can't load {path}: {reason}") from None

    def _run_options(self, **entries: str) -> Any:
        """Options of a run; dots of a key are written as two underscores."""
        options = self._ort.RunOptions()
        for key, value in entries.items():
            options.add_run_config_entry(key.replace("__", "."), value)
        return options

    def _check_decoder(self, decoder: Any) -> Any:
        if "last_rows" not in {entry.name for entry in decoder.get_inputs()}:
            raise EngineError(f"{self._directory} was built by an older starkv; build it again")
        return decoder

    @property
    @abstractmethod
    def info(self) -> EngineInfo: ...

    @property
    @abstractmethod
    def _vision(self) -> Any:
        """Session of ``vision.onnx``."""

    @property
    @abstractmethod
    def _vision_run(self) -> Any:
        """Options of a run of ``vision.onnx``, whose memory should go back to the system after it: a large
        image's activations would stay reserved as long as the engine lives."""

    @property
    @abstractmethod
    def _last_run(self) -> Any:
        """Options of a prefill's last run, likewise."""

    @property
    @abstractmethod
    def _chunk(self) -> int:
        """Rows per prefill call."""

    @property
    @abstractmethod
    def _compressor(self) -> OrtCompressor: ...

    @abstractmethod
    def _prefill_chunk(
        self, arena: Arena, embeds: Floats, rope: Rope, logits: Floats, options: Any | None
    ) -> None:
        """Append embeddings ``[1, S, hidden]`` and write the last row's logits ``[1, vocab]``."""

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def embed(self, token_ids: Sequence[int]) -> Floats:
        return self._embedding(token_ids)

    def encode_image(self, image: ImageInputs) -> Floats:
        plan = plan_vision(image.grid_h, image.grid_w, self._manifest.vision)
        feeds = {"pixel_values": image.pixel_values, **plan.inputs()}
        embeds: Floats = self._vision.run(["image_embeds"], feeds, self._vision_run)[0]
        return embeds

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
        for length in chunk_lengths(total, self._chunk, self._manifest.observation_window):
            part = slice(done, done + length)
            done += length
            options = self._last_run if done == total else None
            tables = Rope(rope.cos[:, part], rope.sin[:, part])
            self._prefill_chunk(arena, embeds[None, part], tables, logits, options)
        row: Floats = logits[0]
        return row

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

    def _check_decode(self, pool: Pool, embeds: Floats) -> None:
        expected = (pool.active, self._manifest.text.hidden)
        if not pool.active or embeds.shape != expected:
            raise ValueError(f"decode got embeddings {embeds.shape} for {pool.active} sequences in use")
        if int(pool.kv.lengths[:, : pool.active].max()) >= pool.kv.capacity:
            raise UsageError(f"a sequence has filled its slot of {pool.kv.capacity} rows")


def store_norms(arena: Arena, norms: Floats, rows: int) -> None:
    """Note the norms ``[L, 1, S]`` of new rows behind those of the arena's rows."""
    for layer, start in enumerate(arena.kv.lengths[:, 0]):
        arena.hidden_norm[layer, :, start : start + rows] = norms[layer]
